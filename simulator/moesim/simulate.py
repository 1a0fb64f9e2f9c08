"""One simulation from start to end, and the row that reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moepolicy import Kind, PolicySpec
from moepolicy.cache import Journal, Observer
from moepolicy.state import ALL_MASS, COUNTERS, LOW_MASS, SKIPPED_MASS, SUBSTITUTED_MASS, Cache
from moeroute import Trace
from moeroute.schema import TraceMeta, prediction_column

from moesim.costs import Sizes, costs_of
from moesim.engine import Segment
from moesim.engines import Engine, run
from moesim.errors import SimulationError
from moesim.limits import min_loads
from moesim.profile import NS_PER_S, Machine
from moesim.workload import Workload, load_workload

WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Result:
    """One policy on one cache and machine. Counts are of experts, times simulated seconds.

    loads             experts copied over the link, prefetches included
    low_loads         of those, the ones that brought the lower precision
    cpu_experts       misses computed where the experts are kept, and not copied
    *_share           of the gates' weights, what was left out, computed by another expert, or
                      computed at the lower precision
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
    limit_loads: int
    lossy: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


def workload_for(trace: Trace, policies: list[PolicySpec]) -> Workload:
    """Read a trace once for all ``policies``; TraceError names a column one of them needs."""
    needs = {"predictions": prediction_column(1), "logits": "router_logits"}
    for policy in policies:
        for need, column in needs.items():
            if need in policy.requires:
                trace.require(column, f"policy '{policy.label}'")
    wanted = {need for policy in policies for need in policy.requires}
    return load_workload(trace, predictions="predictions" in wanted, logits="logits" in wanted)


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
) -> Result:
    """Replay ``workload`` under ``policy`` with ``slots`` a layer on ``machine``.

    ``low_bytes`` is the size of an expert in a second store, of lower precision; 0: there is none.
    ``timeline`` is filled with what every lane did. Raises SimulationError or PolicyError where
    the run is impossible.
    """
    if "cpu" in policy.requires and machine.cpu is None:
        raise SimulationError(
            f"policy '{policy.label}' computes on CPU workers, and machine '{machine.name}' has "
            "none: add a [cpu] section to its profile"
        )
    if "low" in policy.requires and not low_bytes:
        raise SimulationError(
            f"policy '{policy.label}' loads experts at a lower precision, and there is no store of "
            "one: give --low-precision or --low-expert-bytes"
        )
    context = workload.context(slots, scope)
    size = expert_size(workload.meta, precision=precision, expert_bytes=expert_bytes)
    sizes = sizes_of(workload.meta, size, low_bytes)
    cache, clock = run(
        workload,
        policy,
        context,
        lambda cache: costs_of(workload, machine, sizes, predicting=cache.prefetching),
        engine=engine,
        observers=observers,
        journal=journal,
        timeline=timeline is not None,
    )
    if timeline is not None:
        timeline += clock.segments or []
    count = cache.board[COUNTERS:].tolist()
    hits, late, misses = count[Kind.HIT], count[Kind.LATE], count[Kind.MISS]
    prefetches = count[Kind.SPECULATE]
    loads = count[Kind.LOAD] + prefetches
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
        bypasses=count[Kind.BYPASS],
        prefetches=prefetches,
        useless_prefetches=count[Kind.USELESS],
        cpu_experts=count[Kind.COMPUTE],
        low_loads=count[Kind.LOW],
        substituted=count[Kind.SUBSTITUTE],
        skipped=count[Kind.SKIP],
        **changed_shares(cache),
        bytes_loaded=(loads - count[Kind.LOW]) * size + count[Kind.LOW] * low_bytes,
        hit_ratio=hits / (hits + late + misses),
        time_s=clock.total_ns / NS_PER_S,
        stall_s=clock.stall_ns / NS_PER_S,
        link_busy_s=clock.link_busy_ns / NS_PER_S,
        tokens_per_s=tokens * NS_PER_S / spent_ns if spent_ns else float("inf"),
        limit_loads=min_loads(workload, slots, scope),
        lossy=policy.policy.lossy,
    )


def changed_shares(cache: Cache) -> dict[str, float]:
    """Of the gates' weights, the shares that a policy's answers to misses changed."""
    entries = {
        "skipped_share": SKIPPED_MASS,
        "substituted_share": SUBSTITUTED_MASS,
        "low_share": LOW_MASS,
    }
    if not len(cache.mass) or not cache.mass[ALL_MASS]:
        return dict.fromkeys(entries, 0.0)
    return {name: float(cache.mass[i] / cache.mass[ALL_MASS]) for name, i in entries.items()}
