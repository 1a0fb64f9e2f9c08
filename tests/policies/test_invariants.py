"""The check that every property test relies on finds each invariant that is broken, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from moepolicy import Context, ExpertCache, Policy, find_policy
from moepolicy.state import ABSENT, DEMAND, PREFETCH, RESIDENT, Cache, check
from support.clock import make_steps


class Guess(Policy):
    """Guesses keys 4 and 5 at every step."""

    requires = frozenset({"predictions"})
    staging = 2

    def __init__(self, context: Context) -> None:
        pass

    def victim(self, layer: int, incoming: int, candidates: np.ndarray) -> int:
        return int(candidates[0])

    def prefetch(self, step: object, keys: np.ndarray) -> int:
        keys[:3] = 4, 5, 7
        return 3


def busy(resizable: bool = True) -> Cache:
    """Two layers of 4 experts, two slots each, two buffers, amid a step of layer 0.

    Key 0 is resident and of the step, as is 1, which travels; 2 and 3 are queued behind it. Key 6
    is resident in layer 1, whose other slot is free. Of the guesses 4 has landed in a buffer, 5
    and 7 are queued.
    """
    steps = make_steps([(0, [0]), (1, [2]), (0, [0, 1, 2, 3])], 4)
    context = Context(2, 4, 2, slots=2)
    cache = ExpertCache(context, Guess(context), max_slots=2 if resizable else None)
    for step in steps[:2]:
        cache.begin(step)
        copy = cache.start()
        assert copy is not None
        cache.finish(copy.key)
        if step.number == 1:
            guess = cache.start()
            assert guess is not None
            cache.finish(guess.key)
        cache.consume(copy.key)
        cache.end()
    cache.begin(steps[2])
    while (copy := cache.start()) is not None and copy.key != 1:
        cache.finish(copy.key)
    cache.check()
    return cache.arrays


def set_key(key: int, **columns: int) -> Callable[[Cache], None]:
    def change(cache: Cache) -> None:
        for name, value in columns.items():
            column = getattr(cache, name)
            assert column[key] != value
            column[key] = value

    return change


def add(array: str, *at: int, by: int = 1) -> Callable[[Cache], None]:
    def change(cache: Cache) -> None:
        getattr(cache, array)[at] += by

    return change


def swap_held(cache: Cache) -> None:
    row = cache.held[0, :2]
    row[:] = row[::-1].copy()


def hold_foreign(cache: Cache) -> None:
    """Layer 0 holds layer 1's key, and the other way round."""
    cache.held[0, 1], cache.held[1, 0] = 6, 1


STAGING = -1  # the last of the areas
BROKEN = [
    (set_key(0, place=-1), "a key on the device without a slot"),
    (set_key(2, place=7), "a key on the device without a slot"),
    (add("n_free", 1, by=-1), "slots lost"),
    (add("n_free", 1), "a slot beyond the limit is kept free"),
    (swap_held, "residents out of order"),
    (set_key(0, staged=1), "a staged key holds a cache slot"),
    (hold_foreign, "a key in a foreign domain"),
    (add("excess", 0), "the slots beyond the limit are miscounted"),
    (add("excess", 0, by=-1), "the slots beyond the limit are miscounted"),
    (add("n_free", STAGING, by=-1), "buffers lost or gained"),
    (add("n_free", STAGING), "buffers lost or gained"),
    (set_key(4, staged=0), "a key in staging is not marked so"),
    (set_key(2, status=RESIDENT, place=3), "a key on the device is nowhere"),
    (set_key(6, place=0), "a slot used twice or not at all"),
    (set_key(4, place=0), "a slot used twice or not at all"),
    (add("free", 1, 0), "a slot used twice or not at all"),
    (add("free", STAGING, 0, by=-1), "a slot used twice or not at all"),
    (set_key(0, is_low=1), "a low copy that nobody asked for"),
    (set_key(6, pinned=1), "pins are not the step's"),
    (set_key(0, pinned=0), "a key of the step is not pinned"),
    (add("substitutes", 0, by=7), "pins are not the step's"),
    (add("substitutes", 0, by=2), "a substitute is not there"),
    (add("n_demand", 0, by=-1), "pins are not the step's"),
    (set_key(3, status=ABSENT), "a queue holds a key that is not queued"),
    (set_key(5, status=ABSENT), "a queue holds a key that is not queued"),
    (set_key(3, queue=PREFETCH), "a queue holds another queue's key"),
    (set_key(5, queue=DEMAND), "a queue holds another queue's key"),
    (set_key(3, previous=-1), "a queue's links disagree"),
    (set_key(7, previous=6), "a queue's links disagree"),
    (add("last", DEMAND, by=-1), "a queue's end is not its last key"),
    (add("last", PREFETCH, by=-1), "a queue's end is not its last key"),
    (add("backlog", 0), "the backlog is miscounted"),
    (add("backlog", 0, by=-1), "the backlog is miscounted"),
]


def broken(cache: Cache) -> str:
    with pytest.raises(AssertionError) as caught:
        check(cache)
    return str(caught.value)


@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_an_invariant_that_is_broken_is_named(change: Callable[[Cache], None], says: str) -> None:
    cache = busy()
    change(cache)
    assert broken(cache) == says


def test_a_key_that_no_queue_holds_is_lost() -> None:
    """Key 3 leaves the queue, its end included, and goes on being queued; key 1 arrives unseen."""
    cache = busy()
    cache.next[2] = -1
    cache.last[DEMAND] = 2
    cache.backlog[0] -= 1
    assert broken(cache) == "a queued key is lost"


def test_the_queues_begin_at_their_first_key() -> None:
    cache = busy()
    cache.first[DEMAND] = 3
    assert broken(cache) == "a queue's links disagree"


def test_slots_beyond_the_limit_stay_for_what_cannot_go_only() -> None:
    """Both of layer 0's keys are the step's, one of them under way. Layer 1 has given a slot up."""

    def shrunk(resizable: bool) -> Cache:
        cache = busy(resizable)
        cache.limit[0] -= 1
        cache.excess[0] += 1
        cache.n_free[1] -= 1
        cache.place[6], freed = 2, 3
        assert cache.free[1, 0] == freed
        if resizable:
            cache.n_spare[0], cache.spare[0] = 1, freed
        return cache

    check(shrunk(True))
    assert broken(shrunk(False)) == "slots gained"
    cache = shrunk(True)
    cache.pinned[0] = 0  # resident, and of no step
    assert broken(cache) == "an expert beyond the limit stays that could go"


def test_low_copies_are_of_keys_that_are_there() -> None:
    context = Context(1, 4, 1, slots=2)
    cache = ExpertCache(context, find_policy("hobbit").build(context))
    cache.arrays.is_low[1] = 1
    assert broken(cache.arrays) == "a low copy of a key that is not there"
