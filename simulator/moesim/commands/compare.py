"""`moesim compare`: policies and cache sizes side by side on one trace and machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from moepolicy.amounts import decimal_bytes
from moepolicy.apps import OutputOptions
from moepolicy.completion import among
from moepolicy.console import FAILED, say
from moepolicy.lists import numbers
from moepolicy.options import formerly
from moepolicy.outputs import check_free, check_suffix
from moepolicy.progress import watched
from moepolicy.tables import wrapped
from moeroute.options import SizeOptions, TraceName, complete_precisions

from moesim.commands.options import (
    ENGINE_HELP,
    Cold,
    PolicyNames,
    Scope,
    Tokens,
    bytes_of,
    calibration_option,
    low_option,
    size_option,
    slots_option,
    tell,
)
from moesim.commands.plot import PlotOptions
from moesim.engines.names import Engine
from moesim.engines.timeline import SUFFIXES, write_timeline
from moesim.errors import SimulationError, UsageError
from moesim.machine.profile import DEFAULT_MACHINE, machine_names
from moesim.workload import DEFAULT_TRACE

if TYPE_CHECKING:
    from moesim.comparison import PolicyComparison, Setting, SizedPolicy


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What is replayed, in caches of which sizes, on which machine."""

    trace: TraceName = DEFAULT_TRACE
    slots: Annotated[
        str | None,
        slots_option(
            ", one number or several: 2,4,6. A global cache holds as many times the layers.",
            "sizes at which policies differ.",
        ),
    ] = None
    scope: Scope = "layer"
    machine: Annotated[
        str | None,
        typer.Option(
            help="The machine to simulate: a name (see 'moesim machines') or a profile (TOML). "
            "Default: one on which policies differ; the table says why.",
            show_default=False,
            autocompletion=among(machine_names),
        ),
    ] = None
    engine: Annotated[Engine, typer.Option(help=ENGINE_HELP)] = Engine.auto
    tokens: Tokens = None
    calibration: Annotated[
        str | None,
        calibration_option(". Default: the trace that is replayed, so that the policies know it."),
    ] = None
    cold: Cold = False
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Replay only the sequences that no policy was fitted on (see 'moesim fit').",
        ),
    ] = False
    fitted_too: Annotated[
        bool,
        typer.Option(
            "--fitted-too", help="Score policies on the sequences that they were fitted on, too."
        ),
    ] = False
    limits: Annotated[
        bool,
        typer.Option(
            "--limits/--no-limits",
            help="Show next to every policy what no policy can beat; takes a pass or two.",
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class ExpertSizeOptions:
    """How big an expert is, at the precision that counts and at the lower one."""

    panel: ClassVar[str] = SizeOptions.panel

    precision: Annotated[
        str | None,
        size_option(
            "Precision of the experts, which says their size: one that the trace or --like lists. "
            "Default: the trace's own.",
            complete_precisions,
        ),
    ] = None
    expert_bytes: Annotated[
        str | None,
        size_option("Instead of --precision: bytes of an expert, such as 94MiB or 66.7MB."),
    ] = None
    low: Annotated[
        str | None, low_option("one that the trace or --like lists."), formerly("--low-precision")
    ] = None
    low_expert_bytes: Annotated[
        str | None, size_option("Instead of --low: bytes of an expert at the lower precision.")
    ] = None


def compare(
    policies: PolicyNames = None,
    *,
    all: Annotated[
        bool, typer.Option("--all", help="Compare every policy of 'moesim policies'.")
    ] = False,
    replay: ReplayOptions,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write what every lane did as Chrome trace events (out.json.gz), for "
            "https://ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
    experts: ExpertSizeOptions,
    sizes: SizeOptions,
    plot: PlotOptions,
    output: OutputOptions,
) -> None:
    """Replay a trace under each policy and cache size, and print them side by side.

    All results are simulated. Three columns compare a policy with what no policy can beat with
    the same slots, knowing the future. x limit: the policy's loads over the fewest loads.
    limit %: tokens/s in % of the most tokens/s. gap %: of the time that lru takes beyond the
    least, how much the policy saves (0 is lru, 100 the limit).
    """
    from moepolicy import find_policy

    from moesim.comparison import prepare, run
    from moesim.engines.compilations import Compilations
    from moesim.pictures.tables import compared
    from moesim.report import rows_of
    from moesim.sizes import spare_slots

    destination = output.checked()
    plot.check(force=output.force)
    if timeline is not None:
        check_suffix(timeline, SUFFIXES, "--timeline")
        check_free(timeline, force=output.force, what="--timeline")
    specs = [find_policy(name) for name in _names(policies, everything=all)]
    setting = _setting(replay, experts, sizes)
    if timeline is not None and setting.expert_bytes is None:
        raise SimulationError(
            "a timeline needs times, and nothing says how big an expert is: give --like or "
            "--expert-bytes"
        )
    named = None if replay.machine is None else setting.machine
    slots = numbers(replay.slots, "--slots")
    tell([*sizes.given().notes(setting.trace.meta), *spare_slots(slots or (), setting.meta)])
    ready = prepare(setting, specs, named, slots)
    setting = ready.setting
    found = run(
        setting,
        specs,
        ready.slots,
        compilations=Compilations(),
        timeline=timeline is not None,
        watch=_progress,
        workload=ready.workload,
    )
    if timeline is not None and setting.expert_bytes is not None:
        _write_timeline(timeline, found, setting, setting.expert_bytes)
        say(f"{timeline}: to see it, open https://ui.perfetto.dev and drop the file there")
    plot.write(lambda: compared(*_drawn(found, setting)), "Policies compared")
    like = {} if sizes.like is None else {"sizes_like": sizes.like}
    provenance = setting.provenance | like
    destination.deliver(rows_of(found.rows, provenance), lambda: _table(found, ready.why))
    if found.failed:
        raise typer.Exit(FAILED)


def _table(found: PolicyComparison, why: str) -> str:
    """The table, and what it says in a sentence."""
    from moesim.reading import sentence
    from moesim.report import table

    title = f"{found.title}\n{why}" if why else found.title
    said = sentence(found.rows)
    return table(found.rows, title, found.alike) + (f"\n{wrapped([said])}" if said else "")


def _drawn(found: PolicyComparison, setting: Setting) -> tuple[list[dict[str, Any]], str, str]:
    """The rows to draw, what they are, and of which trace and machine."""
    machine = setting.machine
    where = f"{setting.trace.title} on {machine.name} ({machine.source} constants)"
    size = setting.expert_bytes
    if size is not None and size not in setting.trace.meta.expert_bytes.values():
        where += f", experts of {decimal_bytes(size)}"  # another model's: speeds are of these
    return [one.row() for one in found.rows], f"simulated, {setting.meta.source} routing", where


def _names(policies: list[str] | None, *, everything: bool) -> list[str]:
    from moepolicy import policy_names

    if everything:
        return list(dict.fromkeys([*(policies or []), *policy_names()]))
    if not policies:
        raise UsageError("name a policy or more, or give --all; 'moesim policies' lists them")
    return policies


def _setting(replay: ReplayOptions, experts: ExpertSizeOptions, sizes: SizeOptions) -> Setting:
    from moesim.comparison import Setting

    if replay.held_out and replay.fitted_too:
        raise UsageError("give --held-out or --fitted-too, not both")
    return Setting.of(
        replay.trace,
        replay.machine or DEFAULT_MACHINE,
        precision=experts.precision,
        expert_bytes=bytes_of(experts.expert_bytes, "--expert-bytes"),
        low_precision=experts.low,
        low_expert_bytes=bytes_of(experts.low_expert_bytes, "--low-expert-bytes"),
        given=sizes.given(),
        calibration=replay.calibration,
        scope=replay.scope,
        engine=replay.engine,
        tokens=replay.tokens,
        cold=replay.cold,
        limits=replay.limits,
        held_out=replay.held_out,
        fitted_too=replay.fitted_too,
    )


def _write_timeline(
    path: Path, found: PolicyComparison, setting: Setting, expert_bytes: int
) -> None:
    from moesim.machine.unknown import size_notes
    from moesim.report import Compared

    ran = [one.result for one in found.rows if isinstance(one, Compared)]
    write_timeline(
        path,
        found.timelines,
        n_experts=setting.meta.n_experts,
        expert_bytes=expert_bytes,
        piece_bytes=min(setting.machine.link.chunk_bytes or expert_bytes, expert_bytes),
        notes=size_notes(result.row() for result in ran),
    )


def _progress(points: list[SizedPolicy]) -> Iterator[SizedPolicy]:
    """The points, with how many are done, how fast, and the time left."""
    named = ((f"{spec.label}, {slots} slots", (slots, spec)) for slots, spec in points)
    return watched("compare", "point", named, len(points))
