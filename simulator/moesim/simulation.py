"""One simulation from start to end, and the row that reports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moepolicy import Context, PolicySpec
from moepolicy.cache import Journal, Observer
from moepolicy.counts import Counts, counts_of
from moepolicy.policy import overrides
from moepolicy.state import Cache
from moeroute import Trace, TraceError
from moeroute.schema import TraceMeta, prediction_column
from moeroute.uses import UseCounts

from moesim.engines.choose import run
from moesim.engines.clock import Segment, SimulatedTime
from moesim.engines.compilations import OF_THIS_PROCESS, Compilations
from moesim.engines.names import Engine
from moesim.engines.onepass import Decisions
from moesim.errors import MissingSize, SimulationError
from moesim.limits import Limits, Shares, limits_of
from moesim.machine.costs import Costs, Sizes, costs_of
from moesim.machine.profile import NS_PER_S, LinkProfile, Machine
from moesim.machine.speed import with_constants
from moesim.result import Result
from moesim.sizes import _HOW_BIG, expert_size, sizes_of
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

IN_MEMORY = 1 << 21  # rows of a trace that is held in memory


# What a policy may require of the steps, and the column of the trace that has it.
COLUMNS = {"logits": "router_logits", "weights": "weights", "tokens": "token_id"}


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
            f"ahead, and the trace has predictions {trace.meta.horizon} ahead: give a trace "
            f"recorded with --horizon {policy.horizon}"
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
        load_workload,
        trace,
        predictions="predictions" in wanted,
        logits="logits" in wanted,
        token_ids="tokens" in wanted,
        rows=any(policy.routes for policy in policies),
    )
    if trace.n_rows <= IN_MEMORY:
        return load()
    with TemporaryDirectory(prefix="moesim-") as folder:
        return load(folder=Path(folder))


def check_calibration(of: UseCounts, meta: TraceMeta) -> None:
    """SimulationError where calibration counts are not of the shape of the replayed trace."""
    if (of.n_layers, of.n_experts) != (meta.n_layers, meta.n_experts):
        raise SimulationError(
            f"{of.path} is of {of.n_layers} layers of {of.n_experts} experts, and the "
            f"trace of {meta.model} of {meta.n_layers} of {meta.n_experts}: give --calibration "
            "a trace of the same model"
        )


@dataclass(frozen=True)
class Case:
    """What is simulated: one policy's cache on a machine, with experts of a size or of none known.

    ``expert_bytes`` None: the size of an expert is unknown; there are counts but no times.
    """

    workload: Workload
    policy: PolicySpec
    machine: Machine
    slots: int  # a layer
    scope: str
    expert_bytes: int | None
    low_bytes: int  # of an expert in a second store; 0: there is none
    cold: bool

    def check(self, *, journal: bool, timeline: bool) -> None:
        """SimulationError where this cannot be simulated, or not be shown like that."""
        if self.cold and journal:
            raise SimulationError(
                "a journal is of one cache, and a cold run has one for each sequence"
            )
        check_workers(self.machine, self.policy)
        if self.policy.routes and self.workload.weight_rule is None:
            raise SimulationError(
                f"policy '{self.policy.label}' gives tokens other experts, and how the gates of "
                f"{self.workload.title} make weights of their logits is neither in the trace's "
                "metadata (weight_rule) nor found from its rows"
            )
        if "low" in self.policy.requires and not self.low_bytes:
            raise SimulationError(
                f"policy '{self.policy.label}' loads experts at a lower precision: give --low or "
                "--low-expert-bytes"
            )
        self._check_constants()
        if timeline and self.expert_bytes is None:
            raise SimulationError(f"a timeline needs times: {_HOW_BIG}")

    def _check_constants(self) -> None:
        """MissingSize where the policy requires a constant that nothing tells."""
        requires, sizes = self.policy.requires, self.sizes
        if sizes is None and requires & {"speed", "bytes"}:
            raise MissingSize(
                f"policy '{self.policy.label}' needs the bytes of an expert: {_HOW_BIG}"
            )
        if "speed" in requires and sizes and "layer" in sizes.uncharged(self.machine):
            raise MissingSize(
                f"policy '{self.policy.label}' needs the time of a layer's compute, and nothing "
                "says how big a layer's dense weights are; give --like or --dense-layer-bytes"
            )

    def parts(self) -> Iterator[Workload]:
        """What is replayed from an empty cache each: the whole, or sequence by sequence."""
        return self.workload.sequences() if self.cold else iter([self.workload])

    @property
    def sizes(self) -> Sizes | None:
        """The bytes that take time; None where there are no times."""
        if self.expert_bytes is None:
            return None
        return sizes_of(self.workload.meta, self.expert_bytes, self.low_bytes)

    def costs(self) -> Callable[[Workload], Costs]:
        """What the steps of a part take. Where there are no times, any costs that decisions can be
        found with; SimulationError where the policy's depend on them."""
        sizes, machine = self.sizes, self.machine
        if sizes is None:
            sizes, machine = Sizes(1, 1, None, None), self._timeless_machine()
        predicting, routing = "predictions" in self.policy.requires, self.policy.routes
        return lambda part: costs_of(part, machine, sizes, predicting=predicting, routing=routing)

    def replayed(
        self,
        replay: Callable[[Workload, PolicySpec, Context, Costs], tuple[Cache, SimulatedTime]],
        timeline: list[Segment] | None,
    ) -> Replayed:
        """Replay the parts one after the other; ``timeline`` is filled."""
        found, costs = Replayed(SimulatedTime(segments=timeline)), self.costs()
        for part in self.parts():
            found.follow(*replay(part, self.policy, self.context(part), costs(part)))
        return found

    def context(self, part: Workload) -> Context:
        """What the policy of a part is made from. Counts are of a calibration trace or of the
        whole; the future is a sequence's own."""
        context = part.context(self.slots, self.scope)._replace(counts=self.workload.counts)
        return with_constants(context, self.machine, self.sizes)

    def _timeless_machine(self) -> Machine:
        """A machine for decisions that do not depend on how long a copy takes.

        Any will do for a policy that copies on demand alone. MissingSize for a prefetcher.
        """
        if overrides(self.policy.build(self.context(self.workload)), "prefetch"):
            raise MissingSize(
                f"policy '{self.policy.label}' prefetches, and which prefetches arrive in time "
                f"depends on the bytes of an expert: {_HOW_BIG}"
            )
        link = LinkProfile(bytes_per_s=self.machine.link.bytes_per_s)
        return replace(self.machine, link=link, disk=None)

    def limits(self, buffers: int) -> Limits:
        """What no policy can beat here with so many buffers for prefetched experts, and with the
        slots shared as the policy shares them."""
        return limits_of(
            self.workload,
            self.machine,
            self.sizes,
            self.slots,
            self.scope,
            buffers=buffers,
            cold=self.cold,
            shares=self.shares,
        )

    @cached_property
    def shares(self) -> Shares:
        """The slots of each layer where the policy shares them out; None: they are equal."""
        return self.policy.shares(self.context(self.workload))


@dataclass
class Replayed:
    """What came of a case's replay: counts, where the time went, buffers for prefetches."""

    clock: SimulatedTime
    counts: Counts = field(default_factory=Counts)
    buffers: int = 0

    def follow(self, cache: Cache, clock: SimulatedTime) -> None:
        """Add the counts and times of the next part's replay."""
        self.counts += counts_of(cache)
        self.clock.follow(clock)
        staging = cache.prefetching and cache.stage_prefetches
        self.buffers = cache.staging_buffers if staging else 0


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
    compilations: Compilations | None = None,
) -> Result:
    """Replay ``workload`` under ``policy`` with ``slots`` a layer on ``machine``.

    ``low_bytes`` is the size of an expert in a second store, of lower precision; 0: there is none.
    ``timeline`` is filled with what every lane did, ns. ``cold``: every sequence begins with empty
    caches, a policy made afresh and an idle link. What is still on its way when a sequence ends
    lands between the two, which takes no time that is counted. ``limits=False`` leaves out what
    no policy can beat. ``decisions``, of the same policy and cache, are timed and not found anew.
    ``compilations`` decides what runs compiled (None: what this process has learnt so far). Where
    nothing says how big an expert is, counts are found and times are None. Raises SimulationError
    or PolicyError where the run is impossible.
    """
    size = expert_size(workload.meta, precision=precision, expert_bytes=expert_bytes)
    case = Case(workload, policy, machine, slots, scope, size, low_bytes, cold)
    case.check(journal=journal is not None, timeline=timeline is not None)
    replay = partial(
        run,
        compilations=compilations or OF_THIS_PROCESS,
        engine=engine,
        observers=observers,
        journal=journal,
        timeline=timeline is not None,
        n_steps=workload.n_steps,
    )
    if decisions is None:
        found = case.replayed(replay, timeline)
    else:
        found = Replayed(decisions.clock(case.costs()(workload)), decisions.counts)
    return _result(case, found, case.limits(found.buffers) if limits else None)


def _result(case: Case, found: Replayed, limit: Limits | None) -> Result:
    """The row of a case."""
    meta, counts, sizes = case.workload.meta, found.counts, case.sizes
    tokens_per_s = None if sizes is None else _tokens_per_s(case.workload, found.clock)
    moved = None
    if case.expert_bytes is not None:
        moved = counts.bytes_over_link(case.expert_bytes, case.low_bytes)
    return Result(
        policy=case.policy.label,
        slots=case.slots,
        scope=case.scope,
        machine=case.machine.name,
        trace=case.workload.title,
        expert_bytes=case.expert_bytes,
        low_expert_bytes=case.low_bytes,
        layer_bytes=meta.layer_bytes,
        token_bytes=meta.token_bytes,
        dense_precision=meta.dense_precision,
        time_is_lower_bound=None if sizes is None else bool(sizes.uncharged(case.machine)),
        steps=case.workload.n_steps,
        **counts.counted(),
        bytes_loaded=moved,
        **_seconds(None if sizes is None else found.clock),
        tokens_per_s=tokens_per_s,
        cold=case.cold,
        shares_slots=case.shares is not None,
        lossy=case.policy.policy.lossy,
        **_limit_columns(limit, tokens_per_s),
    )


def _tokens_per_s(workload: Workload, clock: SimulatedTime) -> float:
    """Of decoded tokens, or of a prompt's where there are no others."""
    tokens, spent_ns = workload.n_decoded, clock.decode_ns
    if not tokens:
        tokens, spent_ns = workload.n_prompt, clock.prompt_ns
    return tokens * NS_PER_S / spent_ns if spent_ns else float("inf")


def _seconds(clock: SimulatedTime | None) -> dict[str, Any]:
    """The columns of a result that tell where the time went; None: there are no times."""
    return {
        "time_s": clock.total_ns / NS_PER_S if clock else None,
        "stall_s": clock.stall_ns / NS_PER_S if clock else None,
        "link_busy_s": clock.link_busy_ns / NS_PER_S if clock else None,
        "gates_s": clock.gates_ns / NS_PER_S if clock else None,
    }


def _limit_columns(limit: Limits | None, tokens_per_s: float | None) -> dict[str, Any]:
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
