"""What a measurement of perplexity shows: rows for programs, and a table for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moepolicy.lossy import CHANGE_HEADING, CHANGE_LEGEND, MARKED, change_cells, marked
from moepolicy.refusals import Refusals, refusal_notes, with_refused
from moepolicy.tables import Format, Table, to_csv, to_json, wrapped

from moerun.amounts import decimal_bytes
from moerun.perplexity.results import Cell


def render(cells: list[Cell], identity: dict[str, Any], format: Format, refused: Refusals) -> str:
    """The cells as a table, JSON or CSV; ``identity`` is what they were measured on, ``refused``
    has the policies that could not run."""
    if format is Format.table:
        return _table(cells, identity) + wrapped(refusal_notes(refused))
    rows = with_refused([asdict(cell) for cell in cells], refused)
    if format is Format.json:
        return to_json({"kind": "measured", **identity, "cells": rows})
    for row in rows:
        published = row.pop("published") or {}
        for name in ("size_gib", "wikitext2", "c4"):
            row[f"published_{name}"] = published.get(name)
    return to_csv(rows)


def _table(cells: list[Cell], identity: dict[str, Any]) -> str:
    known = any(cell.published for cell in cells)
    lossy = any(cell.lossy for cell in cells)
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    keys = ["attention", "experts", *(["policy"] if lossy or len(policies) > 1 else [])]
    names = ["size", "bits/weight", "perplexity", "bits/byte"]
    names += [CHANGE_HEADING] if lossy else []
    names += ["GiB\n(published)", "WikiText-2\n(published)", "C4\n(published)"] if known else []
    table = Table(keys, names)
    for cell in cells:
        row = cell.published
        figures = (row.size_gib, row.wikitext2, row.c4) if row else (None,) * 3 * known
        table.add_row(
            cell.attention,
            cell.experts,
            *([marked(cell.policy, cell.lossy)] if lossy or len(policies) > 1 else []),
            decimal_bytes(cell.store_bytes),
            f"{cell.bits_per_weight:.2f}",
            f"{cell.perplexity:.4f}",
            f"{cell.bits_per_byte:.4f}",
            *([change_cells(cell.shares)] if lossy else []),
            *("" if figure is None else f"{figure:.2f}" for figure in figures),
        )
    title = wrapped([f"{identity['model']}: measured perplexity"])
    return f"{title}\n{table.render()}{wrapped(_legend(cells, identity))}"


def _legend(cells: list[Cell], identity: dict[str, Any]) -> list[str]:
    marks = {cell.policy: " (changes what the model computes)" * cell.lossy for cell in cells}
    how = "decoded token by token" if identity["by_token"] else "read whole"
    lines = [
        f"{cells[0].scored_tokens:,} tokens scored of {identity['tokens']:,} "
        f"({identity['text_bytes']:,} bytes) in windows of {identity['context']:,} every "
        f"{identity['stride']:,}, {how}; policy "
        f"{', '.join(f'{name}{mark}' for name, mark in marks.items())} on {identity['device']}"
    ]
    if any(cell.lossy for cell in cells):
        lines += [MARKED, CHANGE_LEGEND]
    if low_bytes := max(cell.low_expert_bytes for cell in cells):
        lines.append(
            f"lower precision: {identity['low']}, {decimal_bytes(low_bytes)} in addition to size"
        )
    lines += _same_size(cells)
    if any(cell.published for cell in cells):
        lines.append("published: Table 1 of arXiv 2312.17238, Mixtral-8x7B, on its own texts")
    return lines


def _same_size(cells: list[Cell]) -> list[str]:
    """Why weights of several precisions are of one size, where they are."""
    from moerun.format.names import RECORD_ALIGN

    found: dict[tuple[str, int], dict[str, int]] = {}
    for cell in cells:
        sizes = {
            "experts": (cell.experts, cell.expert_bytes, cell.expert_data_bytes),
            "attention": (cell.attention, cell.attention_bytes, cell.attention_data_bytes),
        }
        for what, (precision, n_bytes, data_bytes) in sizes.items():
            found.setdefault((what, n_bytes), {})[precision] = data_bytes
    return [
        f"{what}: {' and '.join(data)} take {decimal_bytes(n_bytes)} alike, since each record is "
        f"rounded up to whole pages of {RECORD_ALIGN:,} bytes; without that "
        f"{' and '.join(map(decimal_bytes, data.values()))} (fewer bits need more scales)"
        for (what, n_bytes), data in found.items()
        if len(set(data.values()) - {0}) > 1
    ]
