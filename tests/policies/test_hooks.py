"""What a policy is told and asked, call by call with every argument, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moepolicy import Context, ExpertCache, Kind, Policy, Transfer, find_policy
from moepolicy.steps import Step
from support.clock import make_steps

N_EXPERTS = 4


class Telling(Policy):
    """Notes what it hears. Evicts the lowest key, retains nothing, guesses what it is given."""

    requires = frozenset({"predictions"})
    staging = 2

    def __init__(self, guesses: dict[int, list[int]]) -> None:
        self.guesses = guesses
        self.told: list[tuple[Any, ...]] = []

    def on_step(self, step: Step) -> None:
        self.told.append(("step", step.number, step.backlog))

    def on_hit(self, key: int, now: int) -> None:
        self.told.append(("hit", key, int(now)))

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        self.told.append(("load", key, speculative, int(now)))

    def on_evict(self, key: int) -> None:
        self.told.append(("evict", int(key)))

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        self.told.append(("victim", layer, incoming, candidates.tolist()))
        return int(candidates[0])

    def retain(self, layer: int, key: int, candidates: Any) -> int:
        self.told.append(("retain", layer, key, candidates.tolist()))
        return -1

    def prefetch(self, step: Step, keys: Any) -> int:
        guesses = self.guesses.get(step.number, [])
        keys[: len(guesses)] = guesses
        return len(guesses)

    def take(self) -> list[tuple[Any, ...]]:
        told, self.told = self.told, []
        return told


def serve(cache: ExpertCache, step: Step) -> None:
    """Begin, bring everything, compute and end."""
    cache.begin(step)
    while copy := cache.start():
        cache.finish(copy.key)
        if cache.arrays.pinned[copy.key]:
            cache.consume(copy.key)
    for key in step.experts.tolist():
        cache.consume(key)
    cache.end()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_policy_hears_keys_layers_and_logical_times(scope: str) -> None:
    """Two layers of 4 experts, two slots a layer. A step's time is 5 for each step before it, and
    more for the heavier experts: of three they are 3, 2 and 1 later. A guess has its step's 5s."""
    demands = [(1, [3, 0]), (1, [0, 3]), (1, [1, 0, 3]), (0, [2]), (1, [2]), (1, [0])]
    steps = make_steps(demands, N_EXPERTS)
    policy = Telling({3: [6]})
    context = Context(2, N_EXPERTS, 2, slots=2, scope="layer")
    if scope == "global":  # as many slots: those of layer 0 are used by layer 1
        context = context._replace(slots=1, scope="global")
    cache = ExpertCache(context, policy)

    serve(cache, steps[0])
    assert policy.take() == [("step", 0, 0), ("load", 7, False, 2), ("load", 4, False, 1)]
    serve(cache, steps[1])  # of the hits the lightest is told first, so that the heaviest is newest
    assert policy.take() == [("step", 1, 0), ("hit", 7, 6), ("hit", 4, 7)]
    serve(cache, steps[2])  # both slots hold what the step uses: 5 passes by
    assert policy.take() == [
        ("step", 2, 0),
        ("hit", 7, 11),
        ("hit", 4, 12),
        ("load", 5, False, 13),
        ("retain", 1, 5, [4, 7]),
        ("evict", 5),
    ]
    serve(cache, steps[3])  # a guess for layer 1 waits in a buffer
    evicts = [] if scope == "layer" else [("victim", 0, 2, [4, 7]), ("evict", 4)]
    assert policy.take() == [("step", 3, 0), *evicts, ("load", 2, False, 16), ("load", 6, True, 15)]
    serve(cache, steps[4])  # and is used: it takes a slot now
    candidates = [4, 7] if scope == "layer" else [2, 7]
    assert policy.take() == [
        ("step", 4, 0),
        ("hit", 6, 21),
        ("victim", 1, 6, candidates),
        ("evict", candidates[0]),
    ]
    serve(cache, steps[5])
    assert policy.take() == [
        ("step", 5, 0),
        ("victim", 1, 4, [6, 7]),
        ("evict", 6),
        ("load", 4, False, 26),
    ]


def test_the_backlog_is_of_copies_queued_and_under_way() -> None:
    steps = make_steps([(0, [0]), (1, [1]), (0, [2])], N_EXPERTS)
    policy = Telling({0: [5, 6]})
    cache = ExpertCache(Context(2, N_EXPERTS, 1, slots=2), policy)
    cache.begin(steps[0])
    for _ in range(2):  # the demand, and one of two guesses
        assert cache.start() is not None
    cache.finish(0)
    cache.consume(0)
    cache.end()
    cache.begin(steps[1])  # a guess under way, one queued
    assert policy.take()[-2:] == [("step", 1, 2), ("hit", 5, 6)]
    assert np.flatnonzero(cache.arrays.status).tolist() == [0, 5]  # the other was disproved


def test_a_driver_is_told_what_would_start_and_what_did() -> None:
    """One layer-0 slot, so that the second step's copy takes the first one's; a guess for layer 1
    waits behind the demand, and its copy evicts nothing."""
    steps = make_steps([(0, [0]), (0, [1])], N_EXPERTS)
    cache = ExpertCache(Context(2, N_EXPERTS, 1, slots=1), Telling({1: [6]}), max_slots=2)
    assert (cache.queued(), cache.in_step()) == (None, False)
    cache.begin(steps[0])
    assert (cache.queued(), cache.in_step()) == (Kind.LOAD, True)
    assert cache.start() == Transfer(0, cache.slot_of(0), False, False, False)
    assert cache.queued() is None
    assert cache.start() is None
    cache.finish(0)
    cache.consume(0)
    cache.end()
    slot = cache.slot_of(0)
    cache.begin(steps[1])
    assert cache.queued() is Kind.LOAD  # before the guess, which is queued, too
    assert cache.start() == Transfer(1, slot, False, True, False)
    assert (cache.slot_of(0), cache.slot_of(1)) == (-1, slot)
    assert cache.queued() is Kind.SPECULATE
    assert cache.start() == Transfer(6, cache.slot_of(6), True, False, False)
    assert cache.queued() is None
    assert [cache.count(kind) for kind in (Kind.MISS, Kind.EVICT, Kind.SPECULATE)] == [2, 1, 1]
    assert cache.n_slots == 2 * 1 + 2
    cache.resize(0)  # the copy of key 1 is under way; layer 1's slot is free and goes
    assert (cache.shrinking, cache.n_slots, len(cache.spare_slots())) == (True, 3, 3)
    cache.finish(1)
    cache.consume(1)
    cache.end()
    assert (cache.shrinking, cache.in_step(), cache.n_slots) == (False, False, 2)


def test_a_low_copy_is_told_as_one() -> None:
    context = Context(1, N_EXPERTS, 2, slots=4)
    cache = ExpertCache(context, find_policy("hobbit").build(context))
    (step,) = make_steps([(0, [2, 1])], N_EXPERTS)
    cache.begin(step._replace(weights=np.array([0.7, 0.3], np.float32)))
    copies = [cache.start(), cache.start()]
    assert [copy and (copy.key, copy.low) for copy in copies] == [(2, False), (1, True)]
    assert (cache.is_low(2), cache.is_low(1)) == (False, True)
