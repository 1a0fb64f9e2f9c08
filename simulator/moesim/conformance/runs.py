"""What the checks run: a policy in a cache under an arbitrary clock, and on a simulated machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from moepolicy import Context, Event, ExpertCache, Journal, Kind, PolicySpec, Step, TokenRows
from moepolicy.amounts import cache_of, counted
from moepolicy.policy import Policy, defines, overrides
from moepolicy.state import arrays_of

from moesim.conformance.clock import RandomClock
from moesim.conformance.routing import EXPERT_BYTES, seeded_workload
from moesim.engines.choose import run
from moesim.engines.clock import Segment
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import Compute, Cpu, Disk, LinkProfile, Machine
from moesim.machine.speed import with_constants
from moesim.workload.steps import Workload

NS = 1e-9
LOW_BYTES = 4
MORE_THAN_EVER = 1 << 60  # steps
# Times are short and round, so that many things fall together.
MACHINE = Machine(
    "conformance",
    "everything that a profile can say",
    "published",
    LinkProfile(bytes_per_s=1e9, latency_s=2 * NS, streams=2, chunk_bytes=4),
    Compute(token_s=5 * NS, layer_s=5 * NS, gate_sync_s=1 * NS, expert_s=5 * NS),
    disk=Disk(bytes_per_s=2e9, latency_s=1 * NS, host_bytes=6 * EXPERT_BYTES),
    cpu=Cpu(workers=1, expert_s=10 * NS),
)
SIZES = Sizes(EXPERT_BYTES, EXPERT_BYTES // 2, 3, 2, low_bytes=LOW_BYTES)


class CacheSize(NamedTuple):
    """One cache that policies are checked in."""

    slots: int
    scope: str
    streams: int

    def __str__(self) -> str:
        return f"{counted(self.slots, 'slot')} a layer, {cache_of(self.scope)}"


CACHES = (CacheSize(2, "layer", 1), CacheSize(4, "layer", 3), CacheSize(3, "global", 2))


@dataclass
class Decided:
    """What one run decided."""

    events: list[Event] = field(default_factory=list)
    journal: Journal = field(default_factory=list)


@dataclass(frozen=True)
class CheckedPolicy:
    """A policy under check, and the seed of all that it is checked on."""

    spec: PolicySpec
    seed: int = 0

    @cached_property
    def workload(self) -> Workload:
        """The routing, with what the policy requires of it and no more."""
        return self._seeded(n_tokens=40)

    @cached_property
    def long_workload(self) -> Workload:
        """Ten times the steps, for what grows with them."""
        return self._seeded(n_tokens=400)

    def _seeded(self, **sizes: int) -> Workload:
        horizon = max(self.spec.horizon, 1)
        return seeded_workload(self.seed, horizon=horizon, **sizes).shown_to(self.spec)

    def wide_workload(self, n_experts: int, top_k: int) -> Workload:
        """Routing of a model with that many experts a layer."""
        return self._seeded(n_experts=n_experts, top_k=top_k, n_tokens=30)

    @property
    def knows_the_future(self) -> bool:
        """Whether the policy runs on recorded traces only, from the begin to the end."""
        return "future" in self.spec.requires

    def asks(self, hook: str) -> bool:
        """Whether the policy supplies ``hook``."""
        return overrides(self.spec.build(self.context(self.workload, 2, "layer")), hook)

    def context(self, workload: Workload, slots: int, scope: str) -> Context:
        """What the policy is made from, the constants of the simulated machine included."""
        return with_constants(workload.context(slots, scope), MACHINE, SIZES)

    def cache_for(
        self,
        workload: Workload,
        slots: int,
        scope: str,
        *,
        policy: Policy | None = None,
        **more: Any,
    ) -> ExpertCache:
        """A cache under ``policy``, or one made afresh."""
        context = self.context(workload, slots, scope)
        return ExpertCache(
            context,
            policy or self.spec.build(context),
            name=self.spec.label,
            horizon=len(workload.predicted),
            weight_rule=workload.weight_rule if self.spec.routes else None,
            **more,
        )

    def drive(
        self,
        size: CacheSize,
        *,
        clock: int = 0,
        resizes: bool = False,
        look: Callable[[ExpertCache], None] | None = None,
    ) -> Decided:
        """The routing under an arbitrary clock, the ``clock``-th. ``look`` is given the cache after
        whatever has happened."""
        decided = Decided()
        cache = self.cache_for(
            self.workload,
            size.slots,
            size.scope,
            observers=[decided.events.append],
            journal=decided.journal,
            max_slots=self.workload.meta.n_experts if resizes else None,
        )
        RandomClock(
            cache,
            1000 * self.seed + clock,
            streams=size.streams,
            resizes=resizes,
            look=(lambda: look(cache)) if look else None,
        ).run(steps_of(self.workload))
        return decided

    def simulate(
        self,
        size: CacheSize,
        engine: Engine,
        *,
        compilations: Compilations | None = None,
        observers: tuple[Callable[[Event], None], ...] = (),
    ) -> Simulated:
        """The routing on the simulated machine, interpreted unless ``compilations`` say other."""
        costs = costs_of(
            self.workload,
            MACHINE,
            SIZES,
            predicting="predictions" in self.spec.requires,
            routing=self.spec.routes,
        )
        cache, clock = run(
            self.workload,
            self.spec,
            self.context(self.workload, size.slots, size.scope),
            costs,
            compilations=compilations or Interpreted(),
            engine=engine,
            observers=observers,
            timeline=True,
        )
        arrays = {name: array.copy() for name, array in arrays_of(cache).items()}
        del arrays["events"], arrays["n_events"]  # only SimPy tells
        return Simulated(arrays, clock.total_ns, clock.stall_ns, sorted(clock.segments or []))


class Simulated(NamedTuple):
    """All that a simulation ends with."""

    arrays: dict[str, np.ndarray[Any, Any]]
    total_ns: int
    stall_ns: int
    segments: list[Segment]


class Interpreted(Compilations):
    """Runs nothing compiled."""

    def __init__(self) -> None:
        super().__init__(worth_compiling=MORE_THAN_EVER, worth_loading=MORE_THAN_EVER)


class Compiled(Compilations):
    """Runs all that can be compiled, and keeps quiet about what cannot."""

    def __init__(self) -> None:
        super().__init__(worth_compiling=0)

    def interpret(self, policy: PolicySpec, reason: str) -> None:
        """Note that the policy's class runs interpreted, and why."""
        self.interpreted[policy.policy] = reason


def steps_of(workload: Workload) -> Iterator[tuple[Step, TokenRows | None]]:
    """The steps with their token rows."""
    for number in range(workload.n_steps):
        yield workload.step(number), workload.rows_of(number)


def serve(cache: ExpertCache, step: Step, rows: TokenRows | None) -> None:
    """One step, every copy arriving at once."""
    outcome = cache.begin(step, rows).tolist()
    assert cache.step is not None
    keys = cache.step.experts.tolist()
    for key, kind in zip(keys, outcome, strict=True):
        if kind == Kind.HIT:
            cache.consume(key)
    while cache.arrays.backlog[0]:
        copy = cache.start()
        if copy is None:
            break  # the last guesses found no place
        cache.finish(copy.key)
        if cache.arrays.pinned[copy.key]:
            cache.consume(copy.key)
    cache.end()


def place_of(policy: type[Policy], hook: str) -> str:
    """Where the class defines ``hook``: file and line, or "" where it does not."""
    code = getattr(getattr(policy, hook, None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code and defines(policy, hook) else ""
