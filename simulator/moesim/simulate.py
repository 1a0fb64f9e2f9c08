"""One simulation from start to end, and the row that reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from moepolicy import Kind, PolicySpec
from moepolicy.cache import Journal, Observer
from moepolicy.state import (
    ALL_MASS,
    COUNTERS,
    LOW_MASS,
    MASS_ENTRIES,
    SKIPPED_MASS,
    SUBSTITUTED_MASS,
    Cache,
)
from moeroute import Trace, TraceError
from moeroute.schema import TraceMeta, prediction_column
from numpy.typing import NDArray

from moesim.engines.choose import Engine, run
from moesim.engines.in_simpy import Clock, Segment
from moesim.engines.onepass import Decisions
from moesim.errors import SimulationError, UsageError
from moesim.limits import Limits, limits_of
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import NS_PER_S, Machine
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

IN_MEMORY = 1 << 21  # rows of a trace that is held in memory
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Result:
    """One policy on one cache and machine. Counts are of experts, times simulated seconds.

    loads             experts copied over the link, prefetches included
    low_expert_bytes  of one in the second, lower-precision store; 0: there was none
    low_loads         of those, the ones that brought the lower precision
    cpu_experts       misses computed where the experts are kept, and not copied
    *_share           of the gates' weights, what was left out, computed by another expert, or
                      computed at the lower precision
    hit_ratio         hits / requests; late hits, which were waited for, are not hits
    tokens_per_s      decoded tokens over the time spent on them; of a trace that has none,
                      prompt tokens
    cold              whether caches started empty with every sequence
    lossy             whether the policy changes what the model computes: the limits do not bind it

    Of what no policy can beat with these slots, knowing the future (None: was not asked for):

    limit_loads         the fewest loads, whatever is prefetched or bypassed
    limit_loads_kept    the fewest of a policy that copies on demand only and bypasses nothing
    limit_tokens_per_s  the most tokens/s
    limit_buffers       staging buffers that it may hold prefetched experts in: the policy's own
    share_of_limit      tokens_per_s / limit_tokens_per_s
    """

    policy: str
    slots: int
    scope: str
    machine: str
    trace: str
    expert_bytes: int
    low_expert_bytes: int
    steps: int
    requests: int
    hits: int
    late: int
    misses: int
    loads: int
    bypasses: int
    prefetches: int
    useless_prefetches: int
    cpu_experts: int
    low_loads: int
    substituted: int
    skipped: int
    skipped_share: float
    substituted_share: float
    low_share: float
    bytes_loaded: int
    hit_ratio: float
    time_s: float
    stall_s: float
    link_busy_s: float
    tokens_per_s: float
    cold: bool
    lossy: bool
    limit_loads: int | None
    limit_loads_kept: int | None
    limit_tokens_per_s: float | None
    limit_buffers: int | None
    share_of_limit: float | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


# What a policy may require of the steps, and the column of the trace that has it.
COLUMNS = {"logits": "router_logits", "weights": "weights"}


def check_needs(trace: Trace, policy: PolicySpec) -> None:
    """TraceError that names what ``policy`` requires and ``trace`` lacks."""
    for need, column in COLUMNS.items():
        if need in policy.requires:
            trace.require(column, f"policy '{policy.label}'")
    if policy.horizon and not trace.has(prediction_column(1)):
        trace.require(prediction_column(1), f"policy '{policy.label}'")
    if policy.horizon and not trace.has(prediction_column(policy.horizon)):
        raise TraceError(
            f"{trace.path}: policy '{policy.label}' reads predictions {policy.horizon} layers "
            f"ahead, and the trace has them {trace.meta.horizon} ahead: give one recorded with "
            f"--horizon {policy.horizon}"
        )


def check_workers(machine: Machine, policy: PolicySpec) -> None:
    """SimulationError where ``policy`` computes on CPU workers, and ``machine`` has none."""
    if "cpu" in policy.requires and machine.cpu is None:
        raise SimulationError(
            f"policy '{policy.label}' computes on CPU workers, and machine '{machine.name}' has "
            "none: add a [cpu] section to its profile"
        )


def workload_for(trace: Trace, policies: list[PolicySpec]) -> Workload:
    """Read a trace once for all ``policies``; TraceError names what one of them needs.

    A long one lies in files of the system's folder for temporary ones, which are mapped.
    """
    for policy in policies:
        check_needs(trace, policy)
    wanted = {need for policy in policies for need in policy.requires}
    load = partial(
        load_workload, trace, predictions="predictions" in wanted, logits="logits" in wanted
    )
    if trace.n_rows <= IN_MEMORY:
        return load()
    with TemporaryDirectory(prefix="moesim-") as folder:
        return load(folder=Path(folder))


def check_calibration(calibration: Trace, meta: TraceMeta) -> None:
    """SimulationError where a calibration trace is not of the shape of the replayed one."""
    of = calibration.meta
    if (of.n_layers, of.n_experts) != (meta.n_layers, meta.n_experts):
        raise SimulationError(
            f"{calibration.path} is of {of.n_layers} layers of {of.n_experts} experts, and the "
            f"trace of {meta.model} of {meta.n_layers} of {meta.n_experts}: give --calibration "
            "one of the same model"
        )


def expert_size(meta: TraceMeta, *, precision: str | None, expert_bytes: int | None) -> int:
    """Bytes of one expert: given, of a named precision, or of the trace's own."""
    if expert_bytes is not None:
        if expert_bytes <= 0:
            raise UsageError(f"expert-bytes must be above 0, not {expert_bytes}")
        return expert_bytes
    if not meta.expert_bytes:
        raise SimulationError(
            f"the trace of {meta.model} does not say how big an expert is: give --expert-bytes"
        )
    if precision is None:
        return next(iter(meta.expert_bytes.values()))
    if precision not in meta.expert_bytes:
        raise SimulationError(
            f"the trace has no size for precision '{precision}'; "
            f"it has {', '.join(meta.expert_bytes)}; or give --expert-bytes"
        )
    return meta.expert_bytes[precision]


def low_expert_size(
    meta: TraceMeta, full_bytes: int, *, precision: str | None, expert_bytes: int | None
) -> int:
    """Bytes of one expert in the lower-precision store; 0 where there is none."""
    if precision is None and expert_bytes is None:
        return 0
    low_bytes = expert_size(meta, precision=precision, expert_bytes=expert_bytes)
    if low_bytes >= full_bytes:
        raise SimulationError(
            f"an expert of the lower precision has {low_bytes:,} bytes, no fewer than the other's "
            f"{full_bytes:,}: choose a lower one"
        )
    return low_bytes


def sizes_of(meta: TraceMeta, expert_bytes: int, low_bytes: int = 0) -> Sizes:
    """The byte and parameter counts the machine's rates apply to."""
    for precision, bits in WEIGHT_BITS.items():
        if precision in meta.expert_bytes:
            params = meta.expert_bytes[precision] * 8 // bits
            break
    else:
        params = expert_bytes // 2
    return Sizes(expert_bytes, params, meta.layer_bytes or 0, meta.token_bytes or 0, low_bytes)


def simulate(
    workload: Workload,
    policy: PolicySpec,
    machine: Machine,
    *,
    slots: int,
    scope: str = "layer",
    expert_bytes: int | None = None,
    precision: str | None = None,
    low_bytes: int = 0,
    engine: Engine = Engine.auto,
    observers: tuple[Observer, ...] = (),
    journal: Journal | None = None,
    timeline: list[Segment] | None = None,
    cold: bool = False,
    limits: bool = True,
    decisions: Decisions | None = None,
) -> Result:
    """Replay ``workload`` under ``policy`` with ``slots`` a layer on ``machine``.

    ``low_bytes`` is the size of an expert in a second store, of lower precision; 0: there is none.
    ``timeline`` is filled with what every lane did. ``cold``: every sequence begins with empty
    caches, a policy made afresh and an idle link. What is still on its way when a sequence ends
    lands between the two, which takes no time that is counted. ``limits=False`` leaves out what
    no policy can beat. ``decisions``, of the same policy and cache, are timed and not found anew.
    Raises SimulationError or PolicyError where the run is impossible.
    """
    if cold and journal is not None:
        raise SimulationError("a journal is of one cache, and a cold run has one for each sequence")
    check_workers(machine, policy)
    if "low" in policy.requires and not low_bytes:
        raise SimulationError(
            f"policy '{policy.label}' loads experts at a lower precision, and there is no store of "
            "one: give --low-precision or --low-expert-bytes"
        )
    size = expert_size(workload.meta, precision=precision, expert_bytes=expert_bytes)
    sizes = sizes_of(workload.meta, size, low_bytes)

    def replayed(part: Workload) -> tuple[Cache, Clock]:
        # Counts are what a calibration trace tells of the whole, the future what a sequence holds.
        context = part.context(slots, scope)._replace(counts=workload.counts)
        costs = costs_of(part, machine, sizes, predicting="predictions" in policy.requires)
        return run(
            part,
            policy,
            context,
            costs,
            engine=engine,
            observers=observers,
            journal=journal,
            timeline=timeline is not None,
            n_steps=workload.n_steps,
        )

    clock, counts, buffers = Clock(segments=timeline), np.zeros(len(Kind), np.int64), 0
    mass = np.zeros(MASS_ENTRIES)
    parts = workload.sequences() if cold else iter([workload])
    if decisions is not None:
        predicting = "predictions" in policy.requires
        clock = decisions.clock(costs_of(workload, machine, sizes, predicting=predicting))
        counts, parts = decisions.counts, iter(())
    for part in parts:
        cache, spent = replayed(part)
        counts += cache.board[COUNTERS:]
        mass[: len(cache.mass)] += cache.mass
        clock.follow(spent)
        buffers = cache.staging_buffers if cache.prefetching and cache.stage_prefetches else 0
    count = counts.tolist()
    hits, late, misses = count[Kind.HIT], count[Kind.LATE], count[Kind.MISS]
    prefetches = count[Kind.SPECULATE]
    loads = count[Kind.LOAD] + prefetches
    if workload.n_decoded:
        tokens, spent_ns = workload.n_decoded, clock.decode_ns
    else:
        tokens, spent_ns = workload.n_prompt, clock.prompt_ns
    tokens_per_s = tokens * NS_PER_S / spent_ns if spent_ns else float("inf")
    limit = None
    if limits:
        limit = limits_of(workload, machine, sizes, slots, scope, buffers=buffers, cold=cold)
    return Result(
        policy=policy.label,
        slots=slots,
        scope=scope,
        machine=machine.name,
        trace=workload.title,
        expert_bytes=size,
        low_expert_bytes=low_bytes,
        steps=workload.n_steps,
        requests=hits + late + misses,
        hits=hits,
        late=late,
        misses=misses,
        loads=loads,
        bypasses=count[Kind.BYPASS],
        prefetches=prefetches,
        useless_prefetches=count[Kind.USELESS],
        cpu_experts=count[Kind.COMPUTE],
        low_loads=count[Kind.LOW],
        substituted=count[Kind.SUBSTITUTE],
        skipped=count[Kind.SKIP],
        **_changed(mass),
        bytes_loaded=(loads - count[Kind.LOW]) * size + count[Kind.LOW] * low_bytes,
        hit_ratio=hits / (hits + late + misses),
        time_s=clock.total_ns / NS_PER_S,
        stall_s=clock.stall_ns / NS_PER_S,
        link_busy_s=clock.link_busy_ns / NS_PER_S,
        tokens_per_s=tokens_per_s,
        cold=cold,
        lossy=policy.policy.lossy,
        **_beside(limit, tokens_per_s),
    )


def _changed(mass: NDArray[np.float64]) -> dict[str, Any]:
    """Of the gates' weights, the shares that a policy's answers to misses changed."""
    entries = {
        "skipped_share": SKIPPED_MASS,
        "substituted_share": SUBSTITUTED_MASS,
        "low_share": LOW_MASS,
    }
    return {name: float(mass[i] / (mass[ALL_MASS] or 1.0)) for name, i in entries.items()}


def _beside(limit: Limits | None, tokens_per_s: float) -> dict[str, Any]:
    """The columns of a result that tell its limits."""
    return {
        "limit_loads": limit and limit.loads,
        "limit_loads_kept": limit and limit.loads_kept,
        "limit_tokens_per_s": limit and limit.tokens_per_s,
        "limit_buffers": limit and limit.buffers,
        # Where nothing takes time both are infinite.
        "share_of_limit": limit
        and (1.0 if tokens_per_s == limit.tokens_per_s else tokens_per_s / limit.tokens_per_s),
    }
