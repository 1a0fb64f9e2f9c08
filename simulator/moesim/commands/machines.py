"""`moesim machines`: the machine profiles there are, and how fast they copy and compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among
from moepolicy.tables import Table, described, wrapped

from moesim.commands.options import bytes_of
from moesim.errors import UsageError
from moesim.machine.profile import Machine, load_machine, machine_names

if TYPE_CHECKING:
    from moesim.machine.costs import Sizes


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The model whose experts are copied and computed."""

    panel: ClassVar[str] = "Sizes of the model"

    expert_bytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of one expert, such as 94MiB or 66.7MB: prints what a copy of it takes, "
            "and a layer's compute.",
            show_default=False,
        ),
    ] = None
    expert_params: Annotated[
        int | None,
        typer.Option(
            help="Parameters of one expert. Default: of 16 bits each.", show_default=False, min=1
        ),
    ] = None
    dense_layer_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes of a layer's weights other than routed experts.",
            show_default=False,
            min=1,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts of a token in a layer. Default: 2.", show_default=False, min=1),
    ] = None

    def sizes(self) -> Sizes | None:
        """The sizes; None where none is given. Wrong usage for some without --expert-bytes."""
        from moesim.machine.costs import Sizes

        n_bytes = bytes_of(self.expert_bytes, "--expert-bytes")
        if n_bytes is not None:
            params = self.expert_params or n_bytes // 2
            return Sizes(n_bytes, params, self.dense_layer_bytes, None)
        given = (self.expert_params, self.dense_layer_bytes, self.top_k)
        if any(value is not None for value in given):
            raise UsageError(
                "sizes of a model say nothing without the experts': give --expert-bytes"
            )
        return None


def machines(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MACHINE",
            help="The machines to show: names, or profiles (TOML) such as 'moerun profile' writes. "
            "Default: all that ship with the simulator.",
            show_default=False,
            autocompletion=among(machine_names),
        ),
    ] = None,
    *,
    model: ExpertOptions,
    output: OutputOptions,
) -> None:
    """List machine profiles: memory, its bandwidth and the link's, and where the rates are from.

    JSON, CSV and Parquet have every constant of each: seconds, bytes and bytes/s. With names, the
    description and the source of every entry of each follow.

    With --expert-bytes also how long one expert's copy from host memory takes, how long a layer of
    a decoded token, and the first over the second: what policies that require "speed" are told.
    """
    destination = output.checked()
    sizes = model.sizes()
    found = {name: load_machine(name) for name in names or machine_names()}
    rows = [_row(name, machine, sizes, model.top_k or 2) for name, machine in found.items()]
    destination.deliver(
        rows, lambda: _overview(found, in_full=bool(names)) if sizes is None else _table(rows)
    )


def _overview(machines: dict[str, Machine], *, in_full: bool) -> str:
    """A line a machine; ``in_full``: and all that the profiles say of themselves."""
    table = Table(
        ["machine"],
        ["memory GiB", "memory GB/s", "link GB/s", "TFLOP/s", "constants"],
        left=["constants"],
    )
    for name, one in machines.items():
        gib = "" if one.memory_bytes is None else f"{one.memory_bytes / 2**30:.0f}"
        rates = one.compute.memory_bytes_per_s, one.link.bytes_per_s, one.compute.flops_per_s
        table.add_row(name, gib, *map(_rate, rates, (1e9, 1e9, 1e12)), one.source)
    text = table.render()
    if not in_full:
        return text + wrapped(
            ["", "moesim machines NAME says where each number of a profile is from."]
        )
    for name, one in machines.items():
        text += "\n" + wrapped([f"{name}: {one.description}"])
        text += described({f"  {entry}": origin for entry, origin in one.sources.items()})
    return text


def _rate(per_s: float, unit: float) -> str:
    if math.isinf(per_s):
        return ""
    return f"{per_s / unit:,.0f}" if per_s >= 100 * unit else f"{per_s / unit:.3g}"


def _row(name: str, machine: Machine, sizes: Sizes | None, top_k: int) -> dict[str, Any]:
    from moesim.machine.speed import copy_ns, copy_over_layer, gates_over_layer, layer_ns

    row = machine.row() | {"machine": name}
    if sizes is None:
        return row
    computed_ns = layer_ns(machine, sizes, top_k)
    known = computed_ns is not None and computed_ns > 0
    return row | {
        "expert_bytes": sizes.expert_bytes,
        "copy_s": copy_ns(machine, sizes.expert_bytes) / 1e9,
        "layer_s": None if computed_ns is None else computed_ns / 1e9,
        # Of a machine that computes in no time it is infinite, and a JSON document has no such.
        "copy_over_layer": copy_over_layer(machine, sizes, top_k) if known else None,
        "gates_over_layer": gates_over_layer(machine, sizes, top_k) if known else None,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    from moesim.report import per_second

    table = Table(["machine"], ["copy ms", "layer ms", "copy / layer"])
    for row in rows:
        spent = (None if row[name] is None else 1e3 * row[name] for name in ("copy_s", "layer_s"))
        table.add_row(
            row["machine"], *(per_second(ms) for ms in spent), per_second(row["copy_over_layer"])
        )
    return table.render()
