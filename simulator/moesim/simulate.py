"""One simulation from start to end, and the row that reports it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from moepolicy import Kind, PolicySpec
from moepolicy.cache import Journal, Observer
from moepolicy.policy import overrides
from moepolicy.state import (
    ALL_MASS,
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
from moesim.engines.clock import Clock, Segment
from moesim.engines.onepass import Decisions
from moesim.errors import SimulationError
from moesim.limits import Limits, limits_of
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import NS_PER_S, Link, Machine
from moesim.result import Result
from moesim.sizes import _HOW_BIG, expert_size, sizes_of
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

IN_MEMORY = 1 << 21  # rows of a trace that is held in memory


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


def _untimed(
    workload: Workload, policy: PolicySpec, machine: Machine, slots: int, scope: str
) -> tuple[Machine, Sizes]:
    """A machine and sizes that decisions can be found on where nobody knows how big an expert is.

    Any will do for a policy that copies on demand alone. SimulationError for one that prefetches.
    """
    if overrides(policy.build(workload.context(slots, scope)), "prefetch"):
        raise SimulationError(
            f"policy '{policy.label}' prefetches, and what comes in time depends on the bytes of "
            f"an expert: {_HOW_BIG}"
        )
    link = Link(bytes_per_s=machine.link.bytes_per_s)
    return replace(machine, link=link, disk=None), Sizes(1, 1, None, None)


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
    Where nothing says how big an expert is, counts are found and times are None.
    Raises SimulationError or PolicyError where the run is impossible.
    """
    if cold and journal is not None:
        raise SimulationError("a journal is of one cache, and a cold run has one for each sequence")
    check_workers(machine, policy)
    if "low" in policy.requires and not low_bytes:
        raise SimulationError(
            f"policy '{policy.label}' loads experts at a lower precision, and there is no store of "
            "one: give --low or --low-expert-bytes"
        )
    size = expert_size(workload.meta, precision=precision, expert_bytes=expert_bytes)
    timed = size is not None
    if size is None:
        if timeline is not None:
            raise SimulationError(f"a timeline is of times: {_HOW_BIG}")
        on, sizes = _untimed(workload, policy, machine, slots, scope)
    else:
        on, sizes = machine, sizes_of(workload.meta, size, low_bytes)

    def replayed(part: Workload) -> tuple[Cache, Clock]:
        # Counts are what a calibration trace tells of the whole, the future what a sequence holds.
        context = part.context(slots, scope)._replace(counts=workload.counts)
        costs = costs_of(part, on, sizes, predicting="predictions" in policy.requires)
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
        clock = decisions.clock(costs_of(workload, on, sizes, predicting=predicting))
        counts, parts = decisions.counts, iter(())
    for part in parts:
        cache, spent = replayed(part)
        counts += cache.counters
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
    tokens_per_s = None
    if timed:
        tokens_per_s = tokens * NS_PER_S / spent_ns if spent_ns else float("inf")
    limit = None
    if limits:
        known = sizes if timed else None
        limit = limits_of(workload, machine, known, slots, scope, buffers=buffers, cold=cold)
    return Result(
        policy=policy.label,
        slots=slots,
        scope=scope,
        machine=machine.name,
        trace=workload.title,
        expert_bytes=size,
        low_expert_bytes=low_bytes,
        layer_bytes=workload.meta.layer_bytes,
        token_bytes=workload.meta.token_bytes,
        dense_precision=workload.meta.dense_precision,
        time_is_lower_bound=bool(sizes.uncharged(machine)) if timed else None,
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
        bytes_loaded=size and (loads - count[Kind.LOW]) * size + count[Kind.LOW] * low_bytes,
        hit_ratio=hits / (hits + late + misses),
        time_s=clock.total_ns / NS_PER_S if timed else None,
        stall_s=clock.stall_ns / NS_PER_S if timed else None,
        link_busy_s=clock.link_busy_ns / NS_PER_S if timed else None,
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


def _beside(limit: Limits | None, tokens_per_s: float | None) -> dict[str, Any]:
    """The columns of a result that tell its limits."""
    share = None
    if limit is not None and limit.tokens_per_s is not None and tokens_per_s is not None:
        # Where nothing takes time both are infinite.
        equal = tokens_per_s == limit.tokens_per_s
        share = 1.0 if equal else tokens_per_s / limit.tokens_per_s
    return {
        "limit_loads": limit and limit.loads,
        "limit_loads_kept": limit and limit.loads_kept,
        "limit_tokens_per_s": limit and limit.tokens_per_s,
        "limit_buffers": limit and limit.buffers,
        "share_of_limit": share,
    }
