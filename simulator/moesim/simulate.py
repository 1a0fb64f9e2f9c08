"""One simulation from start to end, and the row that reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moepolicy import ExpertCache, Kind, Policy, PolicySpec
from moepolicy.cache import Journal, Observer
from moeroute import Trace
from moeroute.schema import TraceMeta, prediction_column

from moesim.engine import Simulation, Sizes
from moesim.errors import SimulationError
from moesim.limits import min_loads
from moesim.profile import NS_PER_S, Machine
from moesim.workload import Workload, load_workload

WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Result:
    """One policy on one cache and machine. Counts are of experts, times simulated seconds.

    loads             experts copied over the link, prefetches included
    hit_ratio         hits / requests; late hits, which were waited for, are not hits
    tokens_per_s      decoded tokens over the time spent on them; of a trace that has none,
                      prompt tokens
    limit_loads       the fewest loads possible with these slots, knowing the future
    """

    policy: str
    slots: int
    scope: str
    machine: str
    trace: str
    expert_bytes: int
    steps: int
    requests: int
    hits: int
    late: int
    misses: int
    loads: int
    bypasses: int
    prefetches: int
    useless_prefetches: int
    bytes_loaded: int
    hit_ratio: float
    time_s: float
    stall_s: float
    link_busy_s: float
    tokens_per_s: float
    limit_loads: int
    lossy: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


def workload_for(trace: Trace, policies: list[PolicySpec]) -> Workload:
    """Read a trace once for all ``policies``; TraceError names a column one of them needs."""
    predictions = False
    for policy in policies:
        if "predictions" in policy.requires:
            trace.require(prediction_column(1), f"policy '{policy.label}'")
            predictions = True
    return load_workload(trace, predictions=predictions)


def expert_size(meta: TraceMeta, *, precision: str | None, expert_bytes: int | None) -> int:
    """Bytes of one expert: given, of a named precision, or of the trace's own."""
    if expert_bytes is not None:
        if expert_bytes <= 0:
            raise SimulationError(f"expert-bytes must be above 0, not {expert_bytes}")
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


def sizes_of(meta: TraceMeta, expert_bytes: int) -> Sizes:
    """The byte and parameter counts the machine's rates apply to."""
    for precision, bits in WEIGHT_BITS.items():
        if precision in meta.expert_bytes:
            params = meta.expert_bytes[precision] * 8 // bits
            break
    else:
        params = expert_bytes // 2
    return Sizes(expert_bytes, params, meta.layer_bytes or 0, meta.token_bytes or 0)


def simulate(
    workload: Workload,
    policy: PolicySpec,
    machine: Machine,
    *,
    slots: int,
    scope: str = "layer",
    expert_bytes: int | None = None,
    precision: str | None = None,
    observers: tuple[Observer, ...] = (),
    journal: Journal | None = None,
) -> Result:
    """Replay ``workload`` under ``policy`` with ``slots`` a layer on ``machine``.

    Raises SimulationError or PolicyError where that is impossible.
    """
    context = workload.context(slots, scope)
    built: Policy = policy.build(context)
    cache = ExpertCache(context, built, name=policy.label, observers=observers, journal=journal)
    size = expert_size(workload.meta, precision=precision, expert_bytes=expert_bytes)
    simulation = Simulation(workload, cache, machine, sizes_of(workload.meta, size))
    clock = simulation.run()
    hits, late, misses = (cache.count(k) for k in (Kind.HIT, Kind.LATE, Kind.MISS))
    prefetches = cache.count(Kind.SPECULATE)
    loads = cache.count(Kind.LOAD) + prefetches
    time_ns = simulation.env.now
    if workload.n_decoded:
        tokens, spent_ns = workload.n_decoded, clock.decode_ns
    else:
        tokens, spent_ns = workload.n_prompt, clock.prompt_ns
    return Result(
        policy=policy.label,
        slots=slots,
        scope=scope,
        machine=machine.name,
        trace=workload.title,
        expert_bytes=size,
        steps=workload.n_steps,
        requests=hits + late + misses,
        hits=hits,
        late=late,
        misses=misses,
        loads=loads,
        bypasses=cache.count(Kind.BYPASS),
        prefetches=prefetches,
        useless_prefetches=cache.count(Kind.USELESS),
        bytes_loaded=loads * size,
        hit_ratio=hits / (hits + late + misses),
        time_s=time_ns / NS_PER_S,
        stall_s=clock.stall_ns / NS_PER_S,
        link_busy_s=clock.link_busy_ns / NS_PER_S,
        tokens_per_s=tokens * NS_PER_S / spent_ns if spent_ns else float("inf"),
        limit_loads=min_loads(workload, slots, scope),
        lossy=policy.policy.lossy,
    )
