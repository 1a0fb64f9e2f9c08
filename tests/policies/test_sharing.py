"""Layers that share a cache's slots unequally, and constants that policies are told."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moepolicy import (
    Context,
    ExpertCache,
    Kind,
    Policy,
    PolicyError,
    PolicyFailed,
    PolicySpec,
    find_policy,
)
from moepolicy.aspects import aspects_of
from moepolicy.interface import check_class
from moepolicy.library.budget.planned import frequent_hits, planned_slots
from moepolicy.library.recency.least_stale import LeastStale
from moepolicy.library.recency.lru import Lru
from numpy.typing import NDArray
from support.clock import make_steps

WRONG = f"{Path(__file__).parents[1] / 'support' / 'policies.py'}:WrongShares"


class ByHand(Lru):
    """1 slot for layer 0 and the rest for layer 1, while there are few; then turned round."""

    @classmethod
    def share_slots(cls, total: int, context: Context) -> NDArray[np.int64]:
        few = min(1, total)
        shares = [few, total - few] if context.slots < 3 else [total - 2, 2]
        return np.array(shares, np.int64)


class Manual:
    """Two layers of 4 experts under `ByHand`; 2 slots a layer at first, which is 1 and 3."""

    def __init__(self, slots: int = 2) -> None:
        self.events: list[tuple[Kind, int]] = []
        context = Context(2, 4, 1, slots)
        self.cache = ExpertCache(
            context,
            ByHand(context),
            observers=[lambda event: self.events.append((event.kind, event.key))],
            max_slots=4,
        )
        self.n_steps = 0

    def begin(self, layer: int, *experts: int) -> None:
        (step,) = make_steps([(layer, experts)], 4)
        self.n_steps += 1
        self.cache.begin(step._replace(number=self.n_steps))
        while copy := self.cache.start():
            self.cache.finish(copy.key)
            self.cache.consume(copy.key)

    def use(self, layer: int, *experts: int) -> list[int]:
        """Use experts; what was evicted by it."""
        seen = len(self.events)
        self.begin(layer, *experts)
        self.cache.end()
        self.cache.check()
        return [key for kind, key in self.events[seen:] if kind == Kind.EVICT]

    def slots(self) -> list[int]:
        arrays = self.cache.arrays
        return [int(arrays.n_held[layer] + arrays.n_free[layer]) for layer in range(2)]


def test_each_layer_has_its_share() -> None:
    """Layer 0 has one slot: expert 1 takes expert 0's. Layer 1 has three: the fourth evicts."""
    manual = Manual()
    assert manual.slots() == [1, 3]
    assert manual.cache.n_slots == 5
    assert manual.use(0, 0) == []
    assert manual.use(0, 1) == [0]
    assert [manual.use(1, expert) for expert in range(4)] == [[], [], [], [4]]
    assert [manual.cache.slot_of(key) for key in (1, 7, 5, 6)] == [0, 1, 2, 3]


def test_a_resize_shares_the_slots_anew() -> None:
    """6 slots: 4 for layer 0 and 2 for layer 1, which gives its least recently used expert up."""
    manual = Manual()
    for expert in range(3):
        manual.use(1, expert)
    manual.cache.resize(3)
    manual.cache.check()
    assert manual.slots() == [4, 2]
    assert manual.events[-1] == (Kind.EVICT, 4)
    assert manual.use(0, 0) == manual.use(0, 1) == manual.use(0, 2) == []


def test_what_a_layer_gets_waits_until_another_gives_it_up() -> None:
    """All three of layer 1's experts are in use: layer 0 gets its fourth slot at the step's end,
    and never are there more slots than 6 and the buffer."""
    manual = Manual()
    manual.begin(1, 0, 1, 2)
    manual.cache.resize(3)
    assert manual.cache.shrinking
    assert manual.slots() == [3, 3]
    assert manual.cache.n_slots == 7
    manual.cache.check()
    manual.cache.end()
    assert manual.slots() == [4, 2]
    assert manual.cache.arrays.excess[0] == 0
    assert manual.cache.n_slots == 7
    manual.cache.check()


def test_a_cache_of_all_layers_has_nothing_to_share() -> None:
    context = Context(2, 4, 1, 2, "global")
    cache = ExpertCache(context, ByHand(context))
    assert cache.arrays.limit.tolist() == [4]
    assert PolicySpec("by-hand", ByHand).shares(context) is None


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        (0, "failed: RuntimeError: no slots to share (share_slots"),
        (1, "share_slots gives out 3 slots, and there are 2"),
        (2, "must answer a whole number for each of 2 layers, and answered [2.0, 2.0]"),
        (3, "share_slots gives layer 0 -1 slots, and a layer has 0 to 4"),
        (4, "must answer a whole number for each of 2 layers, and answered [[8]]"),
    ],
)
def test_shares_that_cannot_be_are_refused(slots: int, says: str) -> None:
    context = Context(2, 4, 1, slots)
    policy = find_policy(WRONG)
    with pytest.raises(PolicyFailed) as caught:
        ExpertCache(context, policy.build(context), name="mine")
    assert "policy 'mine'" in str(caught.value)
    assert says in str(caught.value)
    with pytest.raises(PolicyError):
        policy.shares(context)


def test_a_resize_to_shares_that_cannot_be_changes_nothing() -> None:
    class Breaking(ByHand):
        @classmethod
        def share_slots(cls, total: int, context: Context) -> Any:
            return [total, total] if context.slots == 1 else super().share_slots(total, context)

    context = Context(2, 4, 1, 2)
    journal: list[tuple[int, int]] = []
    cache = ExpertCache(context, Breaking(context), journal=journal, max_slots=4)
    with pytest.raises(PolicyFailed, match="'Breaking': share_slots gives out 4 slots"):
        cache.resize(1)
    cache.check()
    assert cache.arrays.limit.tolist() == [1, 3]
    assert journal == []


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("adapmoe-slots", (2, 4)),
        ("lfu+adapmoe-slots.sharing", (2, 4)),
        ("adapmoe-slots+gate(n=1)", (2, 4)),
        ("adapmoe-slots.eviction", None),
        ("lfu+gate(n=1)", None),
    ],
)
def test_a_composition_shares_as_the_part_for_it(spec: str, shares: tuple[int, ...] | None) -> None:
    context = Context(2, 4, 1, 3, counts=np.array([[5, 0, 3, 0], [2, 2, 2, 2]]))
    policy = find_policy(spec)
    assert policy.shares(context) == shares
    cache = ExpertCache(context, policy.build(context))
    assert cache.arrays.limit.tolist() == list(shares or (3, 3))
    assert shares is None or policy.policy.same_as(context._replace(slots=1)) is None


def test_one_part_alone_shares() -> None:
    assert "sharing" not in aspects_of(find_policy("lru").policy)
    assert aspects_of(find_policy("adapmoe-slots").policy) == {"eviction", "sharing"}
    with pytest.raises(PolicyError, match="both decide sharing"):
        find_policy("lru+adapmoe-slots.sharing+adapmoe-slots.sharing")
    with pytest.raises(PolicyError, match="shares cannot be exchanged while a policy runs"):
        find_policy("adaptive(adapmoe-slots,lru,when=late>0.2)")


def test_share_slots_is_asked_of_the_class() -> None:
    class OfAnObject(Lru):
        def share_slots(self, total: int, context: Context) -> Any:  # type: ignore[override]
            return None

    class OfTwo(Lru):
        @classmethod
        def share_slots(cls, total: int) -> Any:  # type: ignore[override]
            return None

    for policy in (OfAnObject, OfTwo):
        with pytest.raises(PolicyError, match="@classmethod share_slots"):
            check_class("mine", policy)
    check_class("mine", ByHand)


def test_shares_are_given_what_the_class_requires_and_no_more() -> None:
    seen: list[Context] = []

    class Looking(Lru):
        @classmethod
        def share_slots(cls, total: int, context: Context) -> Any:
            seen.append(context)

    class Counting(Looking):
        requires = frozenset({"counts", "future"})

    counts, future = np.ones((2, 4), np.int64), np.zeros(1, np.int64)
    context = Context(2, 4, 1, 2, "layer", counts, future, future, future.astype(np.int32))
    context = context._replace(expert_bytes=9, copy_over_layer=2.0)
    ExpertCache(context, Looking(context))
    ExpertCache(context, Counting(context))
    assert seen[0].counts is seen[1].next_use is None
    assert np.shares_memory(seen[1].counts, counts)
    assert seen[1].expert_bytes is None
    with pytest.raises(PolicyError, match="'Counting' needs the expert counts"):
        ExpertCache(context._replace(counts=None), Counting(context))


def test_a_policy_that_shares_is_not_taken_for_another() -> None:
    """With no more slots a layer than top-k, LRU and FIFO are the same; not so with shares."""

    class Stale(LeastStale):
        @classmethod
        def share_slots(cls, total: int, context: Context) -> Any:
            return ByHand.share_slots(total, context)

    context = Context(2, 4, 2, 2)
    for policy in (ByHand, Stale):
        assert Lru.same_as(context) is not None
        assert policy.same_as(context) is None
        assert policy.same_as(context._replace(slots=4)) is not None
        shared = context._replace(scope="global", slots=1)
        assert policy.same_as(shared) is None


@pytest.mark.parametrize("need", ["speed", "bytes"])
def test_constants_are_for_those_that_require_them(need: str) -> None:
    class Needing(Lru):
        requires = frozenset({need})

        def __init__(self, context: Context) -> None:
            super().__init__(context)
            self.given = context

    bare = Context(2, 4, 1, 2)
    assert math.isnan(bare.copy_over_layer)
    context = bare._replace(copy_over_layer=1.5, expert_bytes=100, low_bytes=50)
    built: Any = PolicySpec("needing", Needing).build(context)
    known = built.given.copy_over_layer, built.given.expert_bytes, built.given.low_bytes
    if need == "speed":
        assert (known[0], *known[1:]) == (1.5, None, None)
    else:
        assert math.isnan(known[0])
        assert known[1:] == (100, 50)
    with pytest.raises(PolicyError, match=r"policy 'needing' needs the (time|bytes) of an expert"):
        PolicySpec("needing", Needing).build(bare)


@pytest.mark.parametrize("seed", range(6))
def test_planned_shares_have_the_most_hits(seed: int) -> None:
    """Against all shares there are; hits in eighths, so that many are equal."""
    rng = np.random.default_rng(seed)
    n_layers, n_experts = 3, 4
    hits = np.cumsum(rng.integers(0, 3, (n_layers, n_experts + 1)) / 8, axis=1)
    for total in range(n_layers * n_experts + 1):
        found = planned_slots(hits, total)
        every = itertools.product(range(n_experts + 1), repeat=n_layers)
        fit = [shares for shares in every if sum(shares) == total]
        best = max(
            (sum(hits[layer, n] for layer, n in enumerate(shares)), -sum(n * n for n in shares))
            for shares in fit
        )
        assert (
            sum(hits[layer, n] for layer, n in enumerate(found)),
            -int((found**2).sum()),
        ) == best
    with pytest.raises(ValueError, match="cannot share 13 slots"):
        planned_slots(hits, 13)


def test_hits_are_taken_from_the_most_used_experts() -> None:
    counts = np.array([[1, 6, 0, 1], [0, 0, 0, 0]])
    assert frequent_hits(counts).tolist() == [[0, 0.75, 0.875, 1, 1], [0, 0.25, 0.5, 0.75, 1]]


def test_adapmoe_gives_slots_to_the_layer_that_gains_by_them() -> None:
    """Layer 0's uses are of two experts alone, so that two slots serve it; layer 1's of four
    alike."""
    spec = find_policy("adapmoe-slots")
    context = Context(2, 4, 1, 3, counts=np.array([[5, 0, 3, 0], [2, 2, 2, 2]]))
    assert spec.shares(context) == (2, 4)
    assert spec.shares(context._replace(slots=1)) == (2, 0)
    assert isinstance(spec.build(context), Policy)
