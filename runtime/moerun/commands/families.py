"""`moerun families`: which models can be run, and in which formats they may be published."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from moepolicy.apps import OutputOptions
from moepolicy.tables import Table, described
from moeroute.families import FAMILIES, Family


def families(
    *,
    formats: Annotated[
        bool,
        typer.Option(
            "--formats", help="List the formats of quantised checkpoints in place of the families."
        ),
    ] = False,
    output: OutputOptions,
) -> None:
    """List the families of models that run, or with --formats the formats that are read.

    Each family: a published checkpoint, the shapes that 'moerun bench' and --plan know by name with
    their sizes, and the architecture of GGUF files. JSON and CSV have more: further checkpoints,
    the rule of the gates' weights, notes.
    """
    destination = output.checked()
    rows = [_gguf_row(), *map(_format_row, _formats())] if formats else _family_rows()
    plain = [{name: _joined(value) for name, value in row.items()} for row in rows]
    table = _formats_blocks if formats else _families_table
    destination.deliver(plain, lambda: table(rows), rows)


def _family_rows() -> list[dict[str, Any]]:
    from moerun.checkpoint.gguf.config import BY_TRANSFORMERS
    from moerun.checkpoint.gguf.config import FAMILIES as BY_GGUF

    gguf: dict[str, str] = {
        model_type: name for name, each in BY_GGUF.items() for model_type in each.model_types
    }
    gguf |= {model_type: name for name, model_type in BY_TRANSFORMERS.items()}
    return [_family_row(family, gguf) for family in FAMILIES]


def _family_row(family: Family, gguf: dict[str, str]) -> dict[str, Any]:
    from moeroute.models import published

    types = (family.model_type, *family.also)
    shapes = [name for name, entry in published().items() if entry.get("model_type") in types]
    return {
        "family": family.model_type,
        "also": list(family.also),
        "examples": list(family.examples),
        "shapes": {name: _billions(name) for name in shapes},
        "sizes_known": family.weights is not None,
        "gguf": next((gguf[name] for name in types if name in gguf), None),
        "weight_rule": family.weight_rule,
        "notes": family.notes,
    }


def _billions(shape: str) -> float | None:
    """10^9 parameters of a model of the table; None where they cannot be computed."""
    from moeroute import TraceError
    from moeroute.models import find_model

    try:
        return round(find_model(shape).n_params / 1e9, 1)
    except TraceError:
        return None


def _formats() -> list[Any]:
    from moerun.checkpoint.published.table import FORMATS

    return list(FORMATS)


def _gguf_row() -> dict[str, Any]:
    """GGUF files are no tensors of a safetensors checkpoint, so they stand in no table of these."""
    return {
        "format": "GGUF",
        "read": True,
        "native": "its own bits (Q4_K, Q5_K, Q6_K, Q4_0, Q5_0, Q8_0, MXFP4), else 16 bits",
        "published": "of most models, by their users",
        "instead": None,
    }


def _format_row(each: Any) -> dict[str, Any]:
    read = each.reader is not None
    return {
        "format": each.name,
        "read": read,
        "native": each.native if read else None,
        "published": each.published,
        "instead": None if read else each.instead,
    }


def _families_table(rows: list[dict[str, Any]]) -> str:
    columns = ["published as", "shapes (10^9 weights)", "gguf"]
    table = Table(["family"], columns, left=columns)
    for row in rows:
        shapes = (f"{n} ({b})" if b else n for n, b in row["shapes"].items())
        first = next(iter(row["examples"]), "")
        table.add_row(row["family"], first, ", ".join(shapes), row["gguf"] or "")
    return table.render()


def _formats_blocks(rows: list[dict[str, Any]]) -> str:
    """A block for each format: texts this long make no columns that a terminal has room for."""
    return "\n".join(_format_block(row) for row in rows)


def _format_block(row: dict[str, Any]) -> str:
    found = {"at native": row["native"]} if row["read"] else {"instead": row["instead"]}
    about = {"read": "yes" if row["read"] else "no", **found, "published": row["published"]}
    return f"{row['format']}\n" + described({f"  {name}": text for name, text in about.items()})


def _joined(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(value)
    return ", ".join(value) if isinstance(value, list) else value
