"""The command `moesim`: replay recorded routing under policies on a simulated machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import PolicyError, console, find_policy, policy_names
from moepolicy.outputs import Output, check_free, check_suffix
from moepolicy.tables import described
from moeroute import TraceError
from moeroute.sizes import GivenSizes
from rich.console import Console
from rich.progress import track

from moesim.commands.curve import curve
from moesim.commands.options import Force, ResultFile, ResultFormat
from moesim.commands.sizes import Attention, DenseLayerBytes, DenseTokenBytes, Layers, Like
from moesim.commands.sweep import sweep
from moesim.commands.table2 import table2
from moesim.comparison import PolicyComparison, Setting, SizedPolicy, run
from moesim.engines.compilations import Compilations, Engine
from moesim.engines.timeline import SUFFIXES, write_timeline
from moesim.errors import SimulationError
from moesim.machine.profile import DEFAULT_MACHINE, load_machine, machine_names
from moesim.machine.unknown import size_notes
from moesim.report import Compared, rows_of, table
from moesim.sizes import quarters
from moesim.workload.loading import DEFAULT_TRACE

app = typer.Typer(
    help="Score cache and prefetch policies for mixture-of-experts offloading on recorded routing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PolicyNames = Annotated[
    list[str],
    typer.Argument(
        metavar="POLICY...",
        help="Policies: a name (see 'moesim policies'), name:parameter=value,..., "
        "or path/to/file.py:Class.",
        show_default=False,
    ),
]


@app.callback()
def _moesim() -> None:
    """Score cache and prefetch policies for expert offloading on recorded routing."""


@app.command()
def compare(
    policies: PolicyNames,
    trace: Annotated[
        str, typer.Option(help="A trace file, or the name of a sample: tiny, mixtral-like.")
    ] = DEFAULT_TRACE,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Experts cached per layer, one or several: 2,4,6. A global cache holds as many "
            "times the layers. Default: a quarter, half and three quarters of a layer's experts.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="One cache a layer, or one for all: layer, global.")
    ] = ("layer"),
    machine: Annotated[
        str, typer.Option(help="A machine's name (see 'moesim machines') or a profile (TOML).")
    ] = DEFAULT_MACHINE,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Size of an expert by its precision, of those the trace or --like lists."
        ),
    ] = None,
    expert_bytes: Annotated[int | None, typer.Option(help="Size of an expert in bytes.")] = None,
    low_precision: Annotated[
        str | None,
        typer.Option(
            help="Size of an expert in a second store, for policies that load some misses at a "
            "lower precision, of those the trace lists.",
            show_default=False,
        ),
    ] = None,
    low_expert_bytes: Annotated[
        int | None, typer.Option(help="The same in bytes.", show_default=False)
    ] = None,
    like: Like = None,
    layers: Layers = None,
    attention: Attention = None,
    dense_layer_bytes: DenseLayerBytes = None,
    dense_token_bytes: DenseTokenBytes = None,
    engine: Annotated[
        Engine,
        typer.Option(help="simpy is the reference, replay the fast loop; the results are equal."),
    ] = Engine.auto,
    tokens: Annotated[
        int | None, typer.Option(help="Only the trace's first tokens.", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The trace in which policies that need it count experts. Default: the one that "
            "is replayed, so that they know it.",
            show_default=False,
        ),
    ] = None,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Empty the caches and make the policy afresh with every sequence."
        ),
    ] = False,
    limits: Annotated[
        bool,
        typer.Option(help="Show beside every policy what none can beat; costs a pass or two."),
    ] = True,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write what every lane did as Chrome trace events (out.json.gz), "
            "for https://ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
    format: ResultFormat = None,
    out: ResultFile = None,
    force: Force = False,
) -> None:
    """Replay a trace under each policy and cache size, and print them side by side.

    Everything printed is simulated. Beside each policy stands what none can beat with the same
    slots, knowing the future: how many times the fewest loads it copied (x limit), its tokens/s in
    % of the most (limit %), and how much of the time that lru takes beyond the least it saves
    (gap %; lru is simulated for that if it is not compared).
    """
    output = Output.checked(out, format, force=force)
    if timeline is not None:
        check_suffix(timeline, SUFFIXES, "--timeline")
        check_free(timeline, force=force, what="--timeline")
    specs = [find_policy(name) for name in policies]
    setting = Setting.of(
        trace,
        machine,
        precision=precision,
        expert_bytes=expert_bytes,
        low_precision=low_precision,
        low_expert_bytes=low_expert_bytes,
        given=GivenSizes(like, layers, attention, {}, dense_layer_bytes, dense_token_bytes),
        calibration=calibration,
        scope=scope,
        engine=engine,
        tokens=tokens,
        cold=cold,
        limits=limits,
    )
    if timeline is not None and setting.expert_bytes is None:
        raise SimulationError(
            "a timeline is of times, and nothing says how big an expert is: give --like or "
            "--expert-bytes"
        )
    sizes = _slots(slots, setting.meta.n_experts)
    found = run(
        setting,
        specs,
        sizes,
        compilations=Compilations(),
        timeline=timeline is not None,
        watch=_progress,
    )
    if timeline is not None and setting.expert_bytes is not None:
        _write_timeline(timeline, found, setting, setting.expert_bytes)
    provenance = setting.provenance | ({} if like is None else {"sizes_like": like})
    output.deliver(
        rows_of(found.rows, provenance), lambda: table(found.rows, found.title, found.alike)
    )


app.command()(curve)
app.command()(sweep)
app.command()(table2)


@app.command("policies")
def list_policies() -> None:
    """List the policies there are."""
    console.emit(described(policy_names()))


@app.command("machines")
def list_machines() -> None:
    """List the machine profiles that ship with the simulator."""
    machines = {name: load_machine(name) for name in machine_names()}
    console.emit(described({n: f"{m.source}: {m.description}" for n, m in machines.items()}))


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


def main() -> None:
    console.run(app, errors=(PolicyError, SimulationError, TraceError))
