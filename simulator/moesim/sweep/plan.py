"""A grid laid out as points: what each point simulates, and the key of its result."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from moepolicy import PolicySpec, find_policy
from moepolicy.blame import files_of
from moeroute import Trace, TraceError, open_trace, prediction_column, sample_names
from moeroute.schema import TraceMeta
from moeroute.uses import UseCounts, uses_of

from moesim.errors import SimulationError, UsageError
from moesim.fitting import refuse_fitted
from moesim.gap import BASELINE
from moesim.machine.profile import Machine, load_machine
from moesim.simulation import check_calibration, check_needs, check_workers
from moesim.sizes import expert_size, low_expert_size, quarters, spare_slots
from moesim.sweep.digests import code_digest, digest_of, machine_digest
from moesim.sweep.grid import Grid
from moesim.sweep.point import Calibration, NamedPolicy, SweepJob, SweepPoint, TraceSource

SHOWN = 3  # reasons in one message


@dataclass(frozen=True)
class SweepPlan:
    """The points in the order of the result's rows, and what all points share."""

    grid: Grid
    job: SweepJob
    points: tuple[SweepPoint, ...]
    all_parameters: tuple[dict[str, Any], ...]  # of each policy, defaults included
    notes: tuple[str, ...] = ()  # on what was asked for

    def name(self, point: SweepPoint) -> str:
        """The name of a point in messages."""
        job = self.job
        size = f"slots={point.slots}"
        if point.slots is None:
            size = f"memory={point.memory_bytes}"
        parts = [job.policies[point.policy].label, size, point.scope]
        parts += [job.machines[point.machine].name, job.traces[point.trace].path]
        if point.precision is not None:
            parts.append(point.precision)
        return " ".join(parts)

    @cached_property
    def asked(self) -> frozenset[str]:
        """The keys of the grid's own points."""
        return frozenset(point.key for point in self.points if not point.reference)

    def references(self) -> dict[str, str]:
        """By the key of each point, the key of its reference: the same point under LRU."""
        bases: dict[tuple[Any, ...], str] = {}
        for point in self.points:
            if self.job.policies[point.policy].label == BASELINE:
                bases[_setting(point)] = point.key
        return {p.key: bases[_setting(p)] for p in self.points if _setting(p) in bases}

    def labels(self, point: SweepPoint) -> dict[str, Any]:
        """The columns that tell one row from another."""
        source = self.job.traces[point.trace]
        policy = self.job.policies[point.policy]
        machine = self.job.machines[point.machine]
        return {
            "key": point.key,
            "policy": policy.label,
            "policy_name": policy.name,
            "parameters": json.dumps(self.all_parameters[point.policy], sort_keys=True),
            "policy_sha256": policy.digest,
            "needs_future": policy.needs_future,
            **({} if point.slots is None else {"slots": point.slots}),
            "memory_bytes": point.memory_bytes,
            "scope": point.scope,
            "machine": machine.name,
            "machine_source": machine.source,
            "machine_sha256": machine_digest(machine),
            "precision": point.precision,
            "expert_bytes": point.expert_bytes or None,
            "trace_path": source.path,
            "trace_sha256": source.digest,
            "trace_seed": source.seed,
            "calibration_sha256": self.job.calibration and self.job.calibration.digest,
        }


def make_plan(grid: Grid) -> SweepPlan:
    """Lay ``grid`` out. Raises SimulationError, PolicyError or TraceError; also where no point of
    the grid can be simulated."""
    specs = grid.specs()
    if not specs:
        raise UsageError("the grid has no policies")
    n_asked = len(specs)
    if grid.limits and BASELINE not in {spec.label for spec in specs}:
        specs.append(find_policy(BASELINE))
    machines = [load_machine(name) for name in grid.machines]
    traces = [open_trace(name) for name in grid.traces]
    calibration = uses_of(grid.calibration) if grid.calibration else None
    layout = _Layout(grid, specs, machines, traces, n_asked, calibration)
    low = grid.low_precision
    if low and not any(low in source.meta.expert_bytes for source in layout.sources):
        raise SimulationError(f"no trace has a size for the lower precision '{low}'")
    points = [point for number in range(len(traces)) for point in layout.points(number)]
    asked = [point for point in points if not point.reference]
    if all(point.refused for point in asked):
        raise none_valid(len(asked), [point.refused or "" for point in asked])
    job = SweepJob(
        traces=tuple(layout.sources),
        policies=tuple(layout.policies),
        machines=tuple(machines),
        engine=grid.engine.value,
        cold=grid.cold,
        limits=grid.limits,
        timings=len(machines) * max(1, len(grid.precisions or grid.expert_bytes)),
        calibration=(Calibration(calibration.counts, calibration.digest) if calibration else None),
    )
    notes = [
        note
        for trace in traces
        for note in (*grid.given.notes(trace.meta), *spare_slots(grid.slots, trace.meta))
    ]
    parameters = tuple(_all_parameters(spec) for spec in specs)
    return SweepPlan(grid, job, tuple(points), parameters, tuple(dict.fromkeys(notes)))


def none_valid(n_points: int, reasons: Iterable[str]) -> SimulationError:
    """The error to raise where no point of a grid can be simulated."""
    different = list(dict.fromkeys(reasons))
    more = f"; and {len(different) - SHOWN} more reasons" if len(different) > SHOWN else ""
    return SimulationError(
        f"none of the grid's {n_points} points can be simulated: "
        + "; ".join(different[:SHOWN])
        + more
    )


class _Layout:
    """Makes the points of one trace after the other."""

    def __init__(
        self,
        grid: Grid,
        specs: list[PolicySpec],
        machines: list[Machine],
        traces: list[Trace],
        n_asked: int,
        calibration: UseCounts | None,
    ) -> None:
        """Policies from number ``n_asked`` on are only references of the others."""
        self.grid = grid
        self.specs = specs
        self.n_asked = n_asked
        self.policies = [_travelling(spec) for spec in specs]
        self.profiles = machines
        self.machines = [machine_digest(machine) for machine in machines]
        self.traces = traces
        self.calibration = calibration
        wanted = {need for spec in specs for need in spec.requires}
        self.sources = [
            TraceSource(
                *_sized(grid, trace),
                path=name,
                place=_place(name, trace),
                digest=trace.digest,
                seed=trace.meta.seed,
                predictions="predictions" in wanted and trace.has(prediction_column(1)),
                logits="logits" in wanted and trace.has("router_logits"),
                token_ids="tokens" in wanted and trace.has("token_id"),
                rows=any(spec.routes for spec in self.specs) and trace.has("weights"),
            )
            for name, trace in zip(grid.traces, traces, strict=True)
        ]

    def points(self, number: int) -> list[SweepPoint]:
        trace, grid = self.traces[number], self.grid
        sizes: list[tuple[int | None, int | None]] = [(None, budget) for budget in grid.memory]
        sizes = sizes or [(slots, None) for slots in grid.slots or quarters(trace.meta.n_experts)]
        precisions: list[tuple[str | None, int | None]] = [(p, None) for p in grid.precisions]
        precisions = precisions or [(None, size) for size in grid.expert_bytes or [None]]
        axes = (grid.scopes, precisions, range(len(self.machines)), sizes, range(len(self.specs)))
        return [
            self._point(number, scope, precision, expert_bytes, machine, slots, budget, policy)
            for scope, (precision, expert_bytes), machine, (slots, budget), policy in product(*axes)
        ]

    def _point(
        self,
        number: int,
        scope: str,
        precision: str | None,
        expert_bytes: int | None,
        machine: int,
        slots: int | None,
        budget: int | None,
        policy: int,
    ) -> SweepPoint:
        trace, spec = self.traces[number], self.specs[policy]
        source, size = self.sources[number], 0
        refused, meta = source.refused, source.meta
        low, low_bytes = self.grid.low_precision, 0
        calibration = self.calibration if "counts" in spec.requires else None
        try:
            check_needs(trace, spec)
            refuse_fitted(trace, [spec])
            check_workers(self.profiles[machine], spec)
            if calibration is not None:
                check_calibration(calibration, trace.meta)
            size = expert_size(meta, precision=precision, expert_bytes=expert_bytes) or 0
            if precision is None and expert_bytes is None:
                precision = next(iter(meta.expert_bytes), None)
            if budget is not None and not size:
                raise SimulationError(
                    f"{source.path}: nothing says how big an expert is, and so how many fit a "
                    "budget: give --like or --expert-bytes"
                )
            if "low" in spec.requires:
                low_bytes = low_expert_size(meta, size or None, precision=low, expert_bytes=None)
        except (SimulationError, TraceError) as error:
            refused = refused or str(error)
        what = {
            "trace": source.digest,
            "policy": self.policies[policy].label,
            "code": self.policies[policy].digest,
            "machine": self.machines[machine],
            "scope": scope,
            "slots": slots,
            "memory_bytes": budget,
            "expert_bytes": size,
            "dense": [meta.expert_params, meta.layer_bytes, meta.token_bytes],
            "cold": self.grid.cold,
            "limits": self.grid.limits,
            "moesim": code_digest(),
        }
        if low_bytes:
            what |= {"low_bytes": low_bytes}
        if calibration is not None:
            what |= {"calibration": calibration.digest}
        if refused:
            what |= {"precision": precision, "path": source.path}
        return SweepPoint(
            key=digest_of(what)[:32],
            trace=number,
            policy=policy,
            machine=machine,
            scope=scope,
            slots=slots,
            expert_bytes=size,
            precision=precision,
            low_bytes=low_bytes,
            memory_bytes=budget,
            refused=refused,
            reference=policy >= self.n_asked,
        )


def _sized(grid: Grid, trace: Trace) -> tuple[TraceMeta, str | None]:
    """A trace's metadata with the sizes that the grid gives, or the reason why they do not fit."""
    try:
        return grid.given.on(trace.meta), None
    except TraceError as error:
        return trace.meta, str(error)


def _setting(point: SweepPoint) -> tuple[Any, ...]:
    """What two points must share for their policies to be compared."""
    size = point.slots, point.memory_bytes
    return point.trace, point.machine, point.scope, *size, point.expert_bytes, point.precision


def _place(name: str, trace: Trace) -> str:
    """Where a worker finds a trace, whatever its folder: every node has the samples by name."""
    if isinstance(trace.path, str) or name in sample_names():
        return name
    return str(trace.path.absolute())


def _travelling(spec: PolicySpec) -> NamedPolicy:
    """What a worker makes the policy of. A file of its own travels along; files of the parts of a
    composition, and params files, must lie where they are on every node."""
    path, mark, _ = spec.name.rpartition(".py:")
    if spec.policy.made_of:
        path, mark = "", ""
    files = [f"{path}.py"] if mark else sorted(files_of(spec.policy))
    text = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    digest = hashlib.sha256(text.encode())
    for fitted in spec.fits:
        digest.update(fitted.path.read_bytes())
    return NamedPolicy(
        name=spec.name,
        parameters=spec.parameters,
        label=spec.label,
        code=text if mark else None,
        digest=digest.hexdigest(),
        needs_future="future" in spec.requires,
    )


def _all_parameters(spec: PolicySpec) -> dict[str, Any]:
    accepted = list(inspect.signature(spec.policy).parameters.values())[1:]
    defaults = {p.name: p.default for p in accepted if p.default is not p.empty}
    return {
        name: value if isinstance(value, int | float | str) else repr(value)
        for name, value in {**defaults, **spec.parameters}.items()
    }
