"""What must hold of every policy: its decisions, and that every engine comes to the same."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import numpy as np
from moepolicy import Event, ExpertCache, Kind, replay_journal

from moesim.conformance.routing import EXPERT_BYTES
from moesim.conformance.runs import (
    CACHES,
    LOW_BYTES,
    MACHINE,
    CheckedPolicy,
    Compiled,
    Simulated,
    place_of,
    steps_of,
)
from moesim.engines.names import Engine
from moesim.simulation import simulate

DIFFERS = "it decides differently when compiled"  # engines.choose says so
CLOCKS = 3
TO_REPEAT = (
    "; keep all state in self, draw from what __init__ makes of a seed, and read no clock: for "
    "example self.rng = np.random.default_rng(seed)"
)
# The hook that a decision of a kind comes of.
_HOOK_OF = {
    Kind.EVICT: "victim",
    Kind.SPECULATE: "prefetch",
    Kind.QUEUE_PREFETCH: "prefetch",
    Kind.COMPUTE: "on_miss",
    Kind.SKIP: "on_miss",
    Kind.LOW: "on_miss",
    Kind.SUBSTITUTE: "substitute",
    Kind.BYPASS: "victim",
}


_AHEAD = (Kind.SPECULATE, Kind.QUEUE_PREFETCH)
FEW_KEYS = 8  # so few prefetches may all be of one layer by chance


class Remark(Exception):
    """A check that does not apply to the policy, or that has more to say than that it held."""


class Violation(Exception):
    """A check that does not hold, and where."""


def keeps_the_rules(checked: CheckedPolicy) -> str:
    """Never over capacity, never evicts what is pinned; every answer is one the hook may give."""
    moves = [0]
    ahead: list[int] = []

    def look(cache: ExpertCache) -> None:
        cache.check()
        held = int((cache.arrays.place >= 0).sum())
        assert held <= cache.n_slots, f"{held} experts in {cache.n_slots} slots"
        moves[0] += 1

    for number, size in enumerate(CACHES):
        decided = checked.drive(size, clock=number, look=look)
        _require_unpinned(decided.events)
        ahead += [event.key for event in decided.events if event.kind in _AHEAD]
    held = f"{len(CACHES)} caches, {checked.workload.n_steps} steps, {moves[0]:,} moves"
    if len(ahead) >= FEW_KEYS and max(ahead) < checked.workload.meta.n_experts:
        raise Remark(
            f"{held}; every expert that it fetches ahead is of layer 0: a key is layer * "
            "n_experts + expert"
        )
    return held


def _require_unpinned(events: list[Event]) -> None:
    """AssertionError where a step evicts what it uses itself, before its end."""
    wanted: dict[int, set[int]] = {}
    bypassed: dict[int, set[int]] = {}
    for event in events:
        pinned = wanted.setdefault(event.step, set())
        if event.kind in (Kind.HIT, Kind.LATE, Kind.MISS):
            pinned.add(event.key)
        elif event.kind in (Kind.COMPUTE, Kind.SKIP, Kind.SUBSTITUTE):
            pinned.discard(event.key)
        elif event.kind is Kind.BYPASS:
            bypassed.setdefault(event.step, set()).add(event.key)
        # A low copy makes room for itself, where `precision` asks for a better one; a bypassed
        # expert takes a slot, where `retain` says so, at the end of the step.
        elif event.kind is Kind.EVICT and event.other not in (
            event.key,
            *bypassed.get(event.step, ()),
        ):
            assert event.key not in pinned, f"step {event.step} evicts key {event.key}, in use"


def repeats(checked: CheckedPolicy) -> str:
    """Two runs with the same seed decide the same."""
    for size in CACHES:
        one, other = checked.drive(size), checked.drive(size)
        _require_equal(checked, one.events, other.events, "a second run", TO_REPEAT)
    return f"{len(CACHES)} caches, twice"


def resizes(checked: CheckedPolicy) -> str:
    """Every rule holds while the cache changes its size in mid-run."""
    if checked.knows_the_future:
        raise Remark("knows the future: it runs in caches of one size")
    for number, size in enumerate(CACHES):
        checked.drive(size, clock=number, resizes=True, look=ExpertCache.check)
    return f"{len(CACHES)} caches, from 0 slots a layer to {checked.workload.meta.n_experts}"


def compiles(checked: CheckedPolicy) -> str:
    """Interpreted equals compiled, or why it runs interpreted."""
    for size in CACHES[:2]:
        known = Compiled()
        found = checked.simulate(size, Engine.replay, compilations=known)
        reason = known.interpreted.get(checked.spec.policy)
        if reason == DIFFERS:
            raise Violation(f"{reason} ({size})")
        if reason:
            raise Remark(f"runs interpreted: {reason}")
        _require_alike(found, checked.simulate(size, Engine.replay), f"compiled, {size}")
    return "compiled and interpreted decide the same, at the same times"


def engines_agree(checked: CheckedPolicy) -> str:
    """SimPy equals the replay, to the nanosecond."""
    for size in CACHES:
        simpy = checked.simulate(size, Engine.simpy)
        _require_alike(simpy, checked.simulate(size, Engine.replay), f"SimPy and replay, {size}")
    return f"{len(CACHES)} caches, decisions and timeline"


def live_is_simulated(checked: CheckedPolicy) -> str:
    """Simulated equals live: a run's journal, and no clock, gives all of its decisions; without
    prefetching every clock does."""
    if checked.knows_the_future:
        raise Remark("knows the future: it never runs live")
    steps, rows = zip(*steps_of(checked.workload), strict=True)
    for size in CACHES:
        decided = checked.drive(size)
        events: list[Event] = []
        again = checked.cache_for(
            checked.workload, size.slots, size.scope, observers=[events.append]
        )
        fresh = [row for _, row in steps_of(checked.workload)] if rows[0] is not None else []
        replay_journal(again, steps, decided.journal, fresh)  # type: ignore[arg-type]
        _require_equal(checked, decided.events, events, "the journal's replay")
        if checked.asks("prefetch"):
            continue
        simulated: list[Event] = []
        checked.simulate(size, Engine.simpy, observers=(simulated.append,))
        _require_equal(checked, simulated, decided.events, "another clock")
        for clock in range(1, CLOCKS):
            other = checked.drive(size, clock=clock)
            _require_equal(checked, decided.events, other.events, "another clock")
    clocks = "by journal" if checked.asks("prefetch") else f"by journal and under {CLOCKS} clocks"
    return f"{len(CACHES)} caches, {clocks}"


def never_beats_the_limit(checked: CheckedPolicy) -> str:
    """No lossless policy has fewer loads, or takes less time, than what nothing can beat."""
    if checked.spec.policy.lossy:
        raise Remark("lossy: the limit does not apply")
    least = []
    for size in CACHES:
        row = simulate(
            checked.workload,
            checked.spec,
            MACHINE,
            slots=size.slots,
            scope=size.scope,
            expert_bytes=EXPERT_BYTES,
            low_bytes=LOW_BYTES,
            engine=Engine.replay,
        )
        brought = row.loads + row.cpu_experts
        limit = row.limit_loads or 0
        if brought < limit:
            raise Violation(
                f"{brought} loads, and no policy can do with fewer than {limit} ({size})"
            )
        if row.share_of_limit is not None and row.share_of_limit > 1 + 1e-9:
            raise Violation(f"{row.share_of_limit:.4f} of the most tokens/s there can be ({size})")
        least.append(f"{brought / limit:.2f}")
    return f"{', '.join(least)} times the fewest loads"


def _require_equal(
    checked: CheckedPolicy, one: list[Event], other: list[Event], what: str, hint: str = ""
) -> None:
    """Violation where the decisions differ: at which step, and by which hook of the policy."""
    for first, second in zip_longest(one, other):
        if first != second:
            known = first or second
            place = place_of(checked.spec.policy, _HOOK_OF.get(known.kind, "victim"))
            raise Violation(
                f"{what} decides differently at step {known.step}: {_said(first)}, then "
                f"{_said(second)}{f' ({place})' if place else ''}{hint}"
            )


def _said(event: Event | None) -> str:
    return "nothing" if event is None else f"{event.kind.name} of key {event.key}"


def _require_alike(one: Simulated, other: Simulated, what: str) -> None:
    """Violation where two simulations ended differently, naming what."""
    names = [
        name
        for name, array in one.arrays.items()
        if not np.array_equal(array, other.arrays[name], equal_nan=_is_float(array))
    ]
    names += [n for n in ("total_ns", "stall_ns") if getattr(one, n) != getattr(other, n)]
    names += ["segments"] * (one.segments != other.segments)
    if names:
        raise Violation(f"{what}: they differ in {', '.join(names)}")


def _is_float(array: np.ndarray[Any, Any]) -> bool:
    return bool(array.dtype.kind == "f")
