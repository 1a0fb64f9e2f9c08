"""The options of `moesim sweep`: the axes of the grid, the sizes, and how the grid is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from moepolicy.completion import listed
from moepolicy.lists import amounts, names
from moepolicy.options import formerly
from moeroute.options import SizeOptions, complete_traces

from moesim.commands.options import (
    ENGINE_HELP,
    Cold,
    calibration_option,
    low_option,
    scopes,
    size_option,
    slots_option,
)
from moesim.engines.names import Engine
from moesim.machine.profile import machine_names

if TYPE_CHECKING:
    from moesim.sweep.run import SweepSettings


def precisions() -> list[str]:
    """The precisions that attention may have."""
    from moeroute.models import ATTENTION

    return list(ATTENTION)


@dataclass(frozen=True, kw_only=True)
class AxisOptions:
    """The axes of the grid, several values each, and what all points share."""

    grid: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of the grid. Axes, lists of values: policies, traces, slots or "
            "memory, scopes, machines, precisions or expert_bytes; tables [parameters.POLICY] of "
            "values. For all points: low_precision, calibration, like, layers, attention, "
            "dense_layer_bytes, dense_token_bytes, engine, cold, limits. docs/sweeping.md has an "
            "example with the defaults.",
            show_default=False,
        ),
    ] = None
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="A trace file, a sample's name, or a URL. May be given several times.",
            show_default=False,
            autocompletion=complete_traces,
        ),
    ] = None
    slots: Annotated[str | None, slots_option(": 2,4,6.")] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --slots: budgets for slots and staging: 4GiB,8GiB.",
            show_default=False,
        ),
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            help="One cache a layer, one for all layers, or both in turn: layer, global or "
            "layer,global.",
            show_default=False,
            autocompletion=listed(scopes),
        ),
    ] = None
    machine: Annotated[
        list[str] | None,
        typer.Option(
            help="The machines to simulate: names or profiles (TOML): t4,a100. May be given "
            "several times.",
            show_default=False,
            autocompletion=listed(machine_names),
        ),
    ] = None
    calibration: Annotated[str | None, calibration_option(", as for compare.")] = None
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of a policy's parameter: lru-spec:n=1,2,3. May be given several times.",
            show_default=False,
        ),
    ] = None
    engine: Annotated[
        Engine | None, typer.Option(help=f"{ENGINE_HELP} Default: auto.", show_default=False)
    ] = None
    cold: Cold = False
    limits: Annotated[
        bool | None,
        typer.Option(
            "--limits/--no-limits",
            help="Add columns of what no policy can beat, and of the gap from lru that a policy "
            "closes; takes some passes for each cache size. Default: yes.",
            show_default=False,
        ),
    ] = None

    def entries(self) -> dict[str, Any]:
        """The entries of a grid that the options give, by the grid's names; empty ones too."""
        return {
            "traces": self.trace,
            "slots": names(self.slots),
            "memory": amounts(self.memory),
            "scopes": names(self.scope),
            "machines": [name for text in self.machine or [] for name in names(text)],
            "calibration": self.calibration,
            "parameters": _parameters(self.param or []),
            "engine": self.engine,
            "cold": self.cold or None,
            "limits": self.limits,
        }


@dataclass(frozen=True, kw_only=True)
class ExpertSizeAxes:
    """How big experts are: precisions or sizes, several each, and the lower precision."""

    panel: ClassVar[str] = SizeOptions.panel

    precision: Annotated[
        str | None,
        size_option(
            "Precisions of the experts, which say their sizes: 2bit,fp16.", listed(precisions)
        ),
    ] = None
    expert_bytes: Annotated[
        str | None,
        size_option(
            "Instead of --precision: bytes of an expert, one amount or several: 94MiB,27MB."
        ),
    ] = None
    low: Annotated[str | None, low_option("2bit."), formerly("--low-precision")] = None

    def entries(self) -> dict[str, Any]:
        """The entries of a grid that the options give, by the grid's names; empty ones too."""
        return {
            "precisions": names(self.precision),
            "expert_bytes": amounts(self.expert_bytes),
            "low_precision": self.low,
        }


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the points run, and what becomes of those of an unfinished sweep."""

    on: Annotated[
        str,
        typer.Option(
            help="Where to run. local: processes on this machine. ray: a Ray of its own on this "
            "machine. ray://host:port: a cluster's client server. host:port: the cluster that "
            "this machine is a node of."
        ),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Points that run at the same time. Default: one a core.",
            show_default=False,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the points that are finished, and run the others."),
    ] = False
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an unfinished sweep's points away.")
    ] = False
    state: Annotated[
        Path | None,
        typer.Option(
            help="The folder for finished points until the sweep ends. Default: next to --out, or "
            "the current folder where --out is a URL.",
            show_default=False,
        ),
    ] = None

    def settings(self) -> SweepSettings:
        """The same for the sweep."""
        from moesim.sweep.run import SweepSettings

        return SweepSettings(self.on, self.workers, self.resume, self.restart, self.state)


def _parameters(texts: list[str]) -> dict[str, dict[str, list[str]]]:
    from moesim.sweep.grid import parse_parameter

    found: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        policy, name, values = parse_parameter(text)
        found.setdefault(policy, {}).setdefault(name, []).extend(values)
    return found
