"""`moesim compare`: policies and cache sizes side by side on one trace and machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import find_policy
from moepolicy.completion import among
from moepolicy.options import formerly
from moepolicy.outputs import check_free, check_suffix
from moeroute.options import SizeOptions, TraceName, complete_precisions, complete_traces
from rich.console import Console
from rich.progress import track

from moesim.commands.options import Cold, OutputOptions, PolicyNames, Scope, Tokens
from moesim.comparison import PolicyComparison, Setting, SizedPolicy, run
from moesim.engines.compilations import Compilations, Engine
from moesim.engines.timeline import SUFFIXES, write_timeline
from moesim.errors import SimulationError
from moesim.machine.profile import DEFAULT_MACHINE, machine_names
from moesim.machine.unknown import size_notes
from moesim.report import Compared, rows_of, table
from moesim.sizes import quarters
from moesim.workload.loading import DEFAULT_TRACE


def compare(
    policies: PolicyNames,
    *,
    trace: TraceName = DEFAULT_TRACE,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Experts cached per layer, one number or several: 2,4,6. A global cache holds as "
            "many times the layers. Default: a quarter, half and three quarters of a layer's "
            "experts.",
            show_default=False,
        ),
    ] = None,
    scope: Scope = "layer",
    machine: Annotated[
        str,
        typer.Option(
            help="The machine to simulate: a name (see 'moesim machines') or a profile (TOML).",
            autocompletion=among(machine_names),
        ),
    ] = DEFAULT_MACHINE,
    engine: Annotated[
        Engine,
        typer.Option(help="simpy is the reference, replay the fast loop. The results are equal."),
    ] = Engine.auto,
    tokens: Tokens = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The trace in which policies that need counts count experts. Default: the trace "
            "that is replayed, so that the policies know it.",
            show_default=False,
            autocompletion=complete_traces,
        ),
    ] = None,
    cold: Cold = False,
    limits: Annotated[
        bool,
        typer.Option(
            "--limits/--no-limits",
            help="Show next to every policy what no policy can beat; takes a pass or two.",
        ),
    ] = True,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write what every lane did as Chrome trace events (out.json.gz), for "
            "https://ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the experts, which says their size: one that the trace or --like "
            "lists. Default: the trace's own.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
            autocompletion=complete_precisions,
        ),
    ] = None,
    expert_bytes: Annotated[
        int | None,
        typer.Option(
            help="Instead of --precision: bytes of an expert.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
        ),
    ] = None,
    low: Annotated[
        str | None,
        typer.Option(
            help="A second precision of the experts, for policies that load some misses at a "
            "lower one: one that the trace or --like lists.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
            autocompletion=complete_precisions,
        ),
        formerly("--low-precision"),
    ] = None,
    low_expert_bytes: Annotated[
        int | None,
        typer.Option(
            help="Instead of --low: bytes of an expert at the lower precision.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
        ),
    ] = None,
    sizes: SizeOptions,
    output: OutputOptions,
) -> None:
    """Replay a trace under each policy and cache size, and print them side by side.

    All results are simulated. Three columns compare a policy with what no policy can beat with
    the same slots, knowing the future. x limit: the policy's loads over the fewest loads.
    limit %: tokens/s in % of the most tokens/s. gap %: of the time that lru takes beyond the
    least, how much the policy saves (0 is lru, 100 the limit).
    """
    destination = output.checked()
    if timeline is not None:
        check_suffix(timeline, SUFFIXES, "--timeline")
        check_free(timeline, force=output.force, what="--timeline")
    specs = [find_policy(name) for name in policies]
    setting = Setting.of(
        trace,
        machine,
        precision=precision,
        expert_bytes=expert_bytes,
        low_precision=low,
        low_expert_bytes=low_expert_bytes,
        given=sizes.given(),
        calibration=calibration,
        scope=scope,
        engine=engine,
        tokens=tokens,
        cold=cold,
        limits=limits,
    )
    if timeline is not None and setting.expert_bytes is None:
        raise SimulationError(
            "a timeline needs times, and nothing says how big an expert is: give --like or "
            "--expert-bytes"
        )
    counts = _slots(slots, setting.meta.n_experts)
    found = run(
        setting,
        specs,
        counts,
        compilations=Compilations(),
        timeline=timeline is not None,
        watch=_progress,
    )
    if timeline is not None and setting.expert_bytes is not None:
        _write_timeline(timeline, found, setting, setting.expert_bytes)
    like = {} if sizes.like is None else {"sizes_like": sizes.like}
    provenance = setting.provenance | like
    destination.deliver(
        rows_of(found.rows, provenance), lambda: table(found.rows, found.title, found.alike)
    )


def _write_timeline(
    path: Path, found: PolicyComparison, setting: Setting, expert_bytes: int
) -> None:
    ran = [one.result for one in found.rows if isinstance(one, Compared)]
    write_timeline(
        path,
        found.timelines,
        n_experts=setting.meta.n_experts,
        expert_bytes=expert_bytes,
        piece_bytes=min(setting.machine.link.chunk_bytes or expert_bytes, expert_bytes),
        notes=size_notes(result.row() for result in ran),
    )


def _progress(points: list[SizedPolicy]) -> Iterable[SizedPolicy]:
    console = Console(stderr=True)
    return track(
        points, "simulating", console=console, transient=True, disable=not console.is_terminal
    )


def _slots(text: str | None, n_experts: int) -> list[int]:
    if text is None:
        return quarters(n_experts)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--slots is '{text}', not whole numbers such as 2,4,6") from None
    if min(counts) < 0:
        raise typer.BadParameter(f"--slots is '{text}': a cache has 0 slots or more")
    return counts
