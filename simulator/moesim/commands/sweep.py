"""`moesim sweep`: every point of a grid, on all cores or a Ray cluster."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import policy_names
from moepolicy.apps import Force
from moepolicy.completion import among, listed
from moepolicy.console import FAILED, INTERRUPTED, CommandError
from moepolicy.options import formerly
from moepolicy.outputs import Output, check_free
from moepolicy.tables import Format
from moeroute.models import ATTENTION
from moeroute.options import SizeOptions, complete_precisions, complete_traces
from moeroute.parquet import is_url
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moesim.commands.options import Cold, scopes
from moesim.engines.compilations import Engine
from moesim.machine.profile import machine_names
from moesim.sweep.grid import load_grid, make_grid, merge, parse_parameter
from moesim.sweep.loop import Watcher
from moesim.sweep.results import read_finished, suffix_of
from moesim.sweep.run import SweepReport, SweepSettings, run_sweep
from moesim.sweep.summary import best, table

SHOWN_FAILURES = 10
LOG_EVERY_S = 60.0  # where stderr is no terminal


def precisions() -> list[str]:
    """The precisions that attention may have."""
    return list(ATTENTION)


def sweep(
    out: Annotated[
        str,
        typer.Option(
            help="Where to write the result, one row a point: a file whose suffix says the format "
            "(.parquet, .csv, .json), or a URL that polars can write Parquet to."
        ),
    ],
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Policies, as for compare. Every axis can also come from --grid; what is given "
            "on the command line takes its place.",
            show_default=False,
            autocompletion=among(policy_names),
        ),
    ] = None,
    *,
    grid: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with the axes: policies, traces, slots or memory, scopes, machines, "
            "precisions or expert_bytes, engine, and tables [parameters.POLICY] of values.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="A trace file, a sample's name, or a URL. May be given several times.",
            show_default=False,
            autocompletion=complete_traces,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Experts cached per layer: 2,4,6. Default: a quarter, half and three quarters of "
            "a layer's experts.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --slots: budgets for slots and staging: 4GiB,8GiB.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="One cache a layer, one for all layers, or both in turn: layer, global or "
            "layer,global.",
            show_default=False,
            autocompletion=listed(scopes),
        ),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            help="The machines to simulate: names or profiles (TOML): t4,a100. May be given "
            "several times.",
            show_default=False,
            autocompletion=listed(machine_names),
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The trace in which policies that need counts count experts, as for compare.",
            show_default=False,
            autocompletion=complete_traces,
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of a policy's parameter: lru-spec:n=1,2,3. May be given several times.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="simpy is the reference, replay the fast loop. The results are equal. "
            "Default: auto.",
            show_default=False,
        ),
    ] = None,
    cold: Cold = False,
    limits: Annotated[
        bool | None,
        typer.Option(
            "--limits/--no-limits",
            help="Add columns of what no policy can beat, and of the gap from lru that a policy "
            "closes; takes some passes for each cache size. Default: yes.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            help="Where to run. local: processes on this machine. ray: a Ray of its own on this "
            "machine. ray://host:port: a cluster's client server. host:port: the cluster that "
            "this machine is a node of."
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Points that run at the same time. Default: one a core.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the points that are finished, and run the others."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an unfinished sweep's points away.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            help="The folder for finished points until the sweep ends. Default: next to --out, or "
            "the current folder where --out is a URL.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    format: Annotated[Format, typer.Option(help="How to print the best policies.")] = Format.table,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions of the experts, which say their sizes: 2bit,fp16.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
            autocompletion=listed(precisions),
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            help="Instead of --precision: bytes of an expert, one number or several.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
        ),
    ] = None,
    low: Annotated[
        str | None,
        typer.Option(
            help="A second precision of the experts, for policies that load some misses at a "
            "lower one: 2bit.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
            autocompletion=complete_precisions,
        ),
        formerly("--low-precision"),
    ] = None,
    sizes: SizeOptions,
) -> None:
    """Simulate every combination of policies, cache sizes and machines.

    Scopes, precisions, traces and policy parameters are axes, too. Finished points survive
    whatever happens: the same command with --resume goes on from them, also with another grid. The
    result does not depend on the number of workers.
    """
    flags = {
        "policies": policies,
        "traces": trace,
        "slots": _split(slots),
        "memory": _split(memory),
        "scopes": _split(scope),
        "machines": [name for text in machine or [] for name in _split(text) or []],
        "precisions": _split(precision),
        "expert_bytes": _split(expert_bytes),
        "low_precision": low,
        **asdict(sizes),
        "calibration": calibration,
        "parameters": _parameters(param or []),
        "engine": engine,
        "cold": cold or None,
        "limits": limits,
    }
    given = {name: value for name, value in flags.items() if value or value is False}
    axes = make_grid(merge(load_grid(grid) if grid else {}, given))
    suffix_of(out)
    if not resume:
        _check_free(out, force=force)
    settings = SweepSettings(on, workers, resume, restart, state)
    began = time.monotonic()
    try:
        with _Show() as show:
            report = run_sweep(axes, out, settings, show.watcher)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _conclude(report, out, format, time.monotonic() - began)
    # A policy that cannot run on a trace or machine leaves its rows empty, as in a comparison.
    if len(report.failures) > report.refused:
        raise typer.Exit(FAILED)


def _check_free(out: str, *, force: bool) -> None:
    """CommandError where a finished sweep, or another file, would be replaced."""
    if not is_url(out):
        check_free(Path(out), force=force)
    elif not force and (points := len(read_finished(out))):
        raise CommandError(
            f"--out {out} exists already, a finished sweep of {points:,} points: --resume goes on "
            "from it, --force replaces it"
        )


class _Show:
    """How far a sweep is, with the time left: a bar on a terminal, else a line a minute."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("simulating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("on {task.fields[workers]} workers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not live)
        self.task = self.bar.add_task("", total=None, workers=0)
        self.watcher = Watcher(advance=self._advance, say=self._say)
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> _Show:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _advance(self, done: int, total: int, workers: int) -> None:
        self.bar.update(self.task, completed=done, total=total, workers=workers)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._logged > LOG_EVERY_S:
            self._logged = now
            left_s = (now - self._began) / done * (total - done) if done else None
            when = "" if left_s is None else f", {left_s / 60:.0f} min left"
            self._say(f"{done} of {total} points on {workers} workers{when}")


def _conclude(report: SweepReport, out: str, format: Format, took_s: float) -> None:
    """The best policies on stdout; on stderr what failed, and what there is now."""
    say = partial(typer.echo, err=True)
    if report.failures:
        say(f"{len(report.failures)} of {len(report.rows)} points failed:")
    for name, error in list(report.failures.items())[:SHOWN_FAILURES]:
        say(f"  {name}: {error}")
    if len(report.failures) > SHOWN_FAILURES:
        say(f"  and {len(report.failures) - SHOWN_FAILURES} more: see column error")
    earlier = f", {report.kept} finished before" if report.kept else ""
    say(f"{out}: {len(report.rows)} points; {report.ran} run in {took_s:.1f} s{earlier}")
    found = best(report.rows)
    if found:
        Output(format, None).deliver(found, lambda: table(found))


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _parameters(texts: list[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        policy, name, values = parse_parameter(text)
        found.setdefault(policy, {}).setdefault(name, []).extend(values)
    return found
