"""Policies side by side on one trace and machine: the command `compare`, and the function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepolicy import Policy, PolicySpec, find_policy
from moepolicy.amounts import cache_of
from moeroute import Trace, open_trace
from moeroute.schema import TraceMeta
from moeroute.sizes import GivenSizes
from moeroute.uses import UseCounts, uses_of

from moesim.choice import choose
from moesim.engines.clock import Segment
from moesim.engines.compilations import OF_THIS_PROCESS, Compilations
from moesim.engines.names import Engine
from moesim.errors import UsageError
from moesim.fitting import COMPARED, held_out, refuse_fitted
from moesim.gap import BASELINE
from moesim.machine.profile import DEFAULT_MACHINE, Machine, load_machine
from moesim.machine.unknown import dense_label, expert_label
from moesim.points import Points, same_figures
from moesim.report import Compared, RefusedPoint, rows_of
from moesim.result import Result
from moesim.simulation import check_calibration, simulate, workload_for
from moesim.sizes import expert_size, low_expert_size
from moesim.workload import DEFAULT_TRACE
from moesim.workload.steps import Workload

if TYPE_CHECKING:
    import polars as pl

PolicyLike = str | type[Policy] | PolicySpec
SizedPolicy = tuple[int, PolicySpec]  # slots a layer, and the policy


@dataclass(frozen=True)
class Setting:
    """What the policies of a comparison share, besides the number of slots."""

    trace: Trace
    meta: TraceMeta  # the trace's, with the sizes that count
    machine: Machine
    expert_bytes: int | None
    low_bytes: int
    scope: str = "layer"
    engine: Engine = Engine.auto
    tokens: int | None = None  # only the first so many
    calibration: UseCounts | None = None
    cold: bool = False
    limits: bool = True
    held_out: bool = False  # only the sequences that no policy was fitted on
    fitted_too: bool = False  # those as well that one was

    @classmethod
    def of(
        cls,
        trace: str | Path | Trace,
        machine: str | Path | Machine,
        *,
        precision: str | None = None,
        expert_bytes: int | None = None,
        low_precision: str | None = None,
        low_expert_bytes: int | None = None,
        given: GivenSizes | None = None,
        calibration: str | Path | Trace | None = None,
        **others: Any,
    ) -> Setting:
        """Look at what was named. Raises TraceError or SimulationError for what is not there, or
        is not of the trace's shape."""
        if precision is not None and expert_bytes is not None:
            raise UsageError("give precision or expert-bytes, not both")
        if low_precision is not None and low_expert_bytes is not None:
            raise UsageError("give low or low-expert-bytes, not both")
        opened = _opened(trace)
        profile = machine if isinstance(machine, Machine) else load_machine(str(machine))
        meta = opened.meta if given is None else given.on(opened.meta)
        size = expert_size(meta, precision=precision, expert_bytes=expert_bytes)
        low = low_expert_size(meta, size, precision=low_precision, expert_bytes=low_expert_bytes)
        counted = None if calibration is None else uses_of(calibration)
        if counted is not None:
            check_calibration(counted, meta)
        return cls(opened, meta, profile, size, low, calibration=counted, **others)

    def on(self, machine: Machine) -> Setting:
        """The same on another machine."""
        return replace(self, machine=machine)

    def title(self, n_tokens: int) -> str:
        """What was simulated, in the lines above a table."""
        lower = f" ({self.low_bytes:,} at the lower precision)" if self.low_bytes else ""
        meta = self.meta
        return (
            f"Simulated on {self.machine.name} ({self.machine.source} constants), "
            f"{expert_label(self.expert_bytes)}{lower}, {cache_of(self.scope)}"
            f"{', cold at every sequence' if self.cold else ''}"
            f"{', on sequences held out from fits' if self.held_out else ''}.\n"
            f"{dense_label(meta)}.\n"
            f"{self.trace.title}: {n_tokens:,} tokens x {meta.n_layers} layers, "
            f"top-{meta.top_k} of {meta.n_experts} experts."
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What a row was made from, for programs."""
        from moesim import __version__

        found: dict[str, Any] = {
            "kind": "simulated",
            "trace_sha256": self.trace.digest,
            "machine_source": self.machine.source,
            "moesim_version": __version__,
        }
        if self.calibration is not None:
            found["calibration_sha256"] = self.calibration.digest
        return found


@dataclass(frozen=True)
class PolicyComparison:
    """What came of it: a row a point, those refused with the reason; timelines if asked for.

    ``failed`` says that a refused row is of a policy whose own code failed.
    """

    rows: list[Compared | RefusedPoint]
    timelines: list[tuple[str, list[Segment]]]
    title: str
    alike: list[str]  # of policies that cannot differ from another here
    failed: bool


def run(
    setting: Setting,
    policies: Sequence[PolicySpec],
    slots: Sequence[int],
    *,
    compilations: Compilations,
    timeline: bool = False,
    watch: Callable[[list[SizedPolicy]], Iterable[SizedPolicy]] = iter,
    workload: Workload | None = None,
) -> PolicyComparison:
    """Simulate every policy with every number of slots; ``watch`` sees the points go by, and
    ``compilations`` decides what runs compiled. ``workload``: what `workload_of` read already.

    Raises what stopped them where none could run.
    """
    points = Points(setting.trace.title, setting.scope, setting.machine.name)
    admitted = [spec for spec in policies if points.admits(setting.trace, spec)]
    if workload is None:
        workload = workload_of(setting, policies, admitted)
    one = partial(
        simulate,
        workload,
        machine=setting.machine,
        scope=setting.scope,
        expert_bytes=setting.expert_bytes,
        low_bytes=setting.low_bytes,
        engine=setting.engine,
        cold=setting.cold,
        limits=setting.limits,
        compilations=compilations,
    )
    timelines = []
    sized = [(count, spec) for count in slots for spec in policies]
    with compilations.expecting(workload.n_steps * len(sized), policies):
        for count, spec in watch(sized):
            segments: list[Segment] | None = [] if timeline else None
            if points.run(spec, count, partial(one, spec, slots=count, timeline=segments)):
                timelines.append((f"{spec.label}, {count} slots", segments or []))

    def baseline(count: int) -> Result:
        return one(find_policy(BASELINE), slots=count)

    return PolicyComparison(
        points.compared(baseline if setting.limits else None),
        timelines,
        setting.title(workload.n_decoded + workload.n_prompt),
        same_figures(policies, workload.context(0, setting.scope), slots),
        points.failed,
    )


@dataclass(frozen=True)
class Prepared:
    """What `run` is given: a setting on its machine, the workload, and sizes; ``why`` says in a
    line how those of the two that nobody named were chosen."""

    setting: Setting
    workload: Workload
    slots: list[int]
    why: str


def prepare(
    setting: Setting,
    policies: Sequence[PolicySpec],
    machine: Machine | None,
    slots: Sequence[int] | None,
) -> Prepared:
    """Read the workload, and choose what is None of machine and slots (see `moesim.choice`)."""
    points = Points(setting.trace.title, setting.scope, setting.machine.name)
    admitted = [spec for spec in policies if points.admits(setting.trace, spec)]
    workload = workload_of(setting, policies, admitted)
    if machine is not None and slots is not None:
        return Prepared(setting.on(machine), workload, list(slots), "")
    chosen = choose(
        workload,
        setting.scope,
        setting.expert_bytes,
        machine=machine,
        slots=None if slots is None else list(slots),
    )
    why = f"Chosen: {chosen.why}. --slots and --machine name others." if chosen.why else ""
    return Prepared(setting.on(chosen.machine), workload, chosen.slots, why)


def workload_of(
    setting: Setting, policies: Sequence[PolicySpec], admitted: Sequence[PolicySpec] | None = None
) -> Workload:
    """What is replayed under ``policies``, read once for all; ``admitted`` are those of them that
    the trace has all for (None: all). Raises TraceError or SimulationError where it cannot be."""
    found = workload_for(setting.trace, list(policies if admitted is None else admitted)).sized(
        setting.meta
    )
    if setting.held_out:
        found = held_out(found, setting.trace, policies)
    elif not setting.fitted_too:
        refuse_fitted(setting.trace, policies, instead=COMPARED)
    if setting.tokens is not None:
        found = found.head(setting.tokens)
    if setting.calibration is not None:
        found = found.calibrated(setting.calibration.counts)
    return found


def compare(
    trace: str | Path | Trace = DEFAULT_TRACE,
    policies: Sequence[PolicyLike] = ("lru", "lfu", "belady"),
    *,
    slots: int | Sequence[int] | None = None,
    machine: str | Path | Machine | None = None,
    scope: str = "layer",
    precision: str | None = None,
    expert_bytes: int | None = None,
    low_precision: str | None = None,
    low_expert_bytes: int | None = None,
    like: str | None = None,
    engine: str = "auto",
    tokens: int | None = None,
    calibration: str | Path | Trace | None = None,
    cold: bool = False,
    limits: bool = True,
    held_out: bool = False,
    fitted_too: bool = False,
) -> pl.DataFrame:
    """Replay a trace under each policy and cache size: what `moesim compare` does, as a frame.

    ``trace`` is a file, the name of a sample, or an open trace; ``policies`` are names, specs such
    as "lru-spec:n=1", or classes; ``slots`` are experts cached a layer; ``machine`` is a name, a
    TOML file, or a Machine (None of the two: such that policies differ); ``like`` names the model
    whose sizes count; ``held_out`` replays only sequences that no policy was fitted on,
    ``fitted_too`` all.
    The rest are the options of the command.

    Returns a row for each policy and number of slots, with the columns of `Result`,
    ``gap_closed_loads``, ``gap_closed_time`` (shares of the gap between LRU and the limit that were
    closed), ``refused`` (why a policy could not run; its other columns are null) and what the row
    was made from. Raises TraceError, PolicyError or SimulationError where nothing can run.
    """
    import polars as pl

    setting = Setting.of(
        trace,
        DEFAULT_MACHINE if machine is None else machine,
        precision=precision,
        expert_bytes=expert_bytes,
        low_precision=low_precision,
        low_expert_bytes=low_expert_bytes,
        given=None if like is None else GivenSizes(like),
        calibration=calibration,
        scope=scope,
        engine=_engine(engine),
        tokens=tokens,
        cold=cold,
        limits=limits,
        held_out=held_out,
        fitted_too=fitted_too,
    )
    specs = [_spec(p) for p in policies]
    given = None if machine is None else setting.machine
    ready = prepare(setting, specs, given, [slots] if isinstance(slots, int) else slots)
    setting = ready.setting
    found = run(setting, specs, ready.slots, compilations=OF_THIS_PROCESS, workload=ready.workload)
    return pl.DataFrame(rows_of(found.rows, setting.provenance), infer_schema_length=None)


def _opened(trace: str | Path | Trace) -> Trace:
    return trace if isinstance(trace, Trace) else open_trace(str(trace))


def _spec(policy: PolicyLike) -> PolicySpec:
    if isinstance(policy, PolicySpec):
        return policy
    return find_policy(policy) if isinstance(policy, str) else PolicySpec(policy.__name__, policy)


def _engine(name: str) -> Engine:
    try:
        return Engine(name)
    except ValueError:
        known = ", ".join(engine.value for engine in Engine)
        raise UsageError(f"unknown engine '{name}': it is one of {known}") from None
