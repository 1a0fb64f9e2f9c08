"""The cache's size changing at any moment: nothing in use is touched, nothing is lost or kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, Kind, PolicyError, find_policy, replay_journal
from moepolicy.cache import Event
from support.clock import context_for, drive, make_steps, scenarios

DEMAND_ONLY = ["lru", "lfu", "fifo", "random:seed=3", "static", "belady", "belady-bypass"]
OWN = Path(__file__).parents[1] / "support" / "policies.py"
SLOT_PREFETCHING = f"{OWN}:SlotSpec"
SHARING, SHARING_AHEAD = f"{OWN}:Sharing", f"{OWN}:SharingAhead"
ANSWERING = f"{OWN}:Anything:seed=4"  # skips, substitutes, computes, lowers
ALL = [
    *DEMAND_ONLY,
    "lru-spec:n=1,staging=1",
    "lru-spec:n=2,staging=4",
    SLOT_PREFETCHING,
    ANSWERING,
    SHARING,
    SHARING_AHEAD,
]


@pytest.mark.parametrize("policy", ALL)
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_invariants_hold_whenever_the_size_changes(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    steps, context = scenario["steps"], scenario["context"]
    cache, seen = drive(
        policy, context, steps, seed=seed, streams=scenario["streams"], check=True, resizes=True
    )
    requests = seen.of_kind(Kind.HIT, Kind.LATE, Kind.MISS)
    assert [key for _, _, key, _ in requests] == [k for s in steps for k in s.experts.tolist()]
    again: list[Event] = []
    other = ExpertCache(
        context,
        find_policy(policy).build(context),
        observers=[again.append],
        max_slots=context.n_experts,
    )
    replay_journal(other, steps, seen.journal)
    assert again == seen.events
    assert other.spare_slots() == cache.spare_slots()


@pytest.mark.parametrize("policy", ["lru-spec", "fiddler", SHARING_AHEAD])
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_compiled_cache_is_resized_as_an_interpreted_one(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    if policy == "fiddler":
        policy = "fiddler:tokens=0"  # it asks for nothing to be computed elsewhere
    steps, context = scenario["steps"], scenario["context"]
    _, expected = drive(policy, context, steps, seed=seed, resizes=True)
    cache, got = drive(policy, context, steps, seed=seed, resizes=True, compile=True)
    cache.check()
    assert got.events == expected.events
    assert got.journal == expected.journal


def test_a_size_that_is_never_changed_changes_nothing() -> None:
    steps = make_steps([(0, [e]) for e in (0, 1, 2, 0, 3, 1)], 4)
    context = context_for(steps, 1, 4, 1, 2, "layer")
    _, fixed = drive("lru", context, steps)
    seen: list[Event] = []
    cache = ExpertCache(
        context, find_policy("lru").build(context), observers=[seen.append], max_slots=4
    )
    replay_journal(cache, steps, fixed.journal)
    assert seen == fixed.events
    assert cache.n_slots == 3
    assert cache.spare_slots() == {3, 4}


class Manual:
    """One layer of 4 experts under a policy, 4 slots at first, driven a step at a time."""

    def __init__(self, policy: str, counts: list[int] | None = None) -> None:
        table = None if counts is None else np.array([counts])
        context = Context(1, 4, 1, 4, "layer", table)
        self.evicted: list[int] = []
        self.cache = ExpertCache(
            context, find_policy(policy).build(context), observers=[self.see], max_slots=4
        )
        self.n_steps = 0

    def see(self, event: Event) -> None:
        if event.kind == Kind.EVICT:
            self.evicted.append(event.key)

    def begin(self, *experts: int) -> list[int]:
        (step,) = make_steps([(0, experts)], 4)
        self.n_steps += 1
        keys: list[int] = self.cache.begin(step._replace(number=self.n_steps)).tolist()
        return keys

    def load(self) -> int:
        copy = self.cache.start()
        assert copy is not None
        return copy.key

    def use(self, *experts: int) -> None:
        self.begin(*experts)
        while copy := self.cache.start():
            self.cache.finish(copy.key)
            self.cache.consume(copy.key)
        self.cache.end()


def test_what_goes_is_what_the_policy_would_evict() -> None:
    manual = Manual("lru")
    for expert in (0, 1, 2, 3, 0):
        manual.use(expert)
    manual.cache.resize(2)
    assert manual.evicted == [1, 2]
    assert len(manual.cache.spare_slots()) == 2
    manual.cache.check()


@pytest.mark.parametrize("policy", ["static", "fiddler:tokens=0"])
def test_a_policy_that_lets_nothing_in_loses_what_it_values_least(policy: str) -> None:
    manual = Manual(policy, counts=[5, 9, 1, 7])
    for expert in range(4):
        manual.use(expert)
    manual.cache.resize(2)
    assert sorted(manual.evicted) == [0, 2]
    manual.cache.resize(3)
    manual.use(0)
    assert manual.begin(0, 1, 3) == [Kind.HIT] * 3


def test_free_slots_go_first() -> None:
    manual = Manual("lru")
    manual.use(0)
    manual.cache.resize(1)
    assert manual.evicted == []
    manual.cache.check()


def test_what_the_step_uses_stays_until_its_end() -> None:
    manual = Manual("lru")
    cache = manual.cache
    manual.use(0, 1, 2)
    manual.begin(0, 1)
    cache.resize(0)
    assert manual.evicted == [2]
    assert cache.arrays.excess[0] == 2
    assert cache.slot_of(0) >= 0
    assert cache.slot_of(1) >= 0
    cache.end()
    assert manual.evicted == [2, 1, 0]  # the heaviest is the most recent
    assert cache.n_slots == 1  # the staging buffer
    cache.check()


def test_a_copy_under_way_is_awaited() -> None:
    manual = Manual("lru")
    cache = manual.cache
    manual.begin(3)
    assert manual.load() == 3
    cache.resize(0)
    assert cache.arrays.excess[0] == 1
    cache.finish(3)
    assert cache.slot_of(3) >= 0
    cache.consume(3)
    cache.end()
    assert cache.slot_of(3) == -1
    cache.check()


def test_growing_again_before_it_could_shrink_keeps_what_is_there() -> None:
    manual = Manual("lru")
    manual.use(0, 1)
    manual.begin(0, 1)
    manual.cache.resize(1)
    manual.cache.resize(3)
    manual.cache.end()
    assert manual.evicted == []
    assert manual.cache.n_slots == 4
    assert manual.begin(0, 1) == [Kind.HIT] * 2


def test_a_cache_shrunk_to_nothing_serves_from_staging_and_recovers() -> None:
    manual = Manual("lru")
    manual.use(0, 1)
    manual.cache.resize(0)
    manual.use(0, 1)
    assert manual.cache.count(Kind.BYPASS) == 2
    manual.cache.resize(4)
    manual.use(0, 1)
    assert manual.begin(0, 1) == [Kind.HIT] * 2


def test_sizes_out_of_bounds_are_refused() -> None:
    manual = Manual("lru")
    with pytest.raises(PolicyError, match="made for 4 slots a layer cannot have 5"):
        manual.cache.resize(5)
    with pytest.raises(PolicyError, match="cannot have -1"):
        manual.cache.resize(-1)
    context = Context(1, 4, 1, 2)
    fixed = ExpertCache(context, find_policy("lru").build(context))
    with pytest.raises(PolicyError, match="cannot have 1"):
        fixed.resize(1)
