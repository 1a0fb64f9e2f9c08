"""The check that every property test relies on finds each invariant that is broken, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from moepolicy import Context, ExpertCache, Policy, find_policy
from moepolicy.state import (
    ABSENT,
    BACKLOG,
    DEMAND,
    EXCESS,
    FIRST,
    HELD,
    IS_LOW,
    LAST,
    LIMIT,
    N_DEMAND,
    N_FREE,
    PINNED,
    PLACE,
    PREFETCH,
    PREVIOUS,
    QUEUE,
    RESIDENT,
    STAGED,
    STAND_INS,
    STATUS,
    Cache,
    check,
)
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
    names = {"status": STATUS, "pinned": PINNED, "staged": STAGED, "place": PLACE}
    names |= {"queue": QUEUE, "previous": PREVIOUS, "is_low": IS_LOW}

    def change(cache: Cache) -> None:
        for name, value in columns.items():
            assert cache.keys[key, names[name]] != value
            cache.keys[key, names[name]] = value

    return change


def add(array: str, *at: int, by: int = 1) -> Callable[[Cache], None]:
    def change(cache: Cache) -> None:
        getattr(cache, array)[at] += by

    return change


def swap_held(cache: Cache) -> None:
    row = cache.domains[0, HELD : HELD + 2]
    row[:] = row[::-1].copy()


def hold_foreign(cache: Cache) -> None:
    """Layer 0 holds layer 1's key, and the other way round."""
    cache.domains[0, HELD + 1], cache.domains[1, HELD] = 6, 1


BROKEN = [
    (set_key(0, place=-1), "a key on the device without a slot"),
    (set_key(2, place=7), "a key on the device without a slot"),
    (add("domains", 1, N_FREE, by=-1), "slots lost"),
    (add("domains", 1, N_FREE), "a slot beyond the limit is kept free"),
    (swap_held, "residents out of order"),
    (set_key(0, staged=1), "a staged key holds a cache slot"),
    (hold_foreign, "a key in a foreign domain"),
    (add("board", EXCESS), "the slots beyond the limit are miscounted"),
    (add("board", EXCESS, by=-1), "the slots beyond the limit are miscounted"),
    (add("staging", N_FREE, by=-1), "buffers lost or gained"),
    (add("staging", N_FREE), "buffers lost or gained"),
    (set_key(4, staged=0), "a key in staging is not marked so"),
    (set_key(2, status=RESIDENT, place=3), "a key on the device is nowhere"),
    (set_key(6, place=0), "a slot used twice or not at all"),
    (set_key(4, place=0), "a slot used twice or not at all"),
    (add("domains", 1, HELD + 2), "a slot used twice or not at all"),
    (add("staging", HELD + 2, by=-1), "a slot used twice or not at all"),
    (set_key(0, is_low=1), "a low copy that nobody asked for"),
    (set_key(6, pinned=1), "pins are not the step's"),
    (set_key(0, pinned=0), "a key of the step is not pinned"),
    (add("scratch", STAND_INS, 0, by=7), "pins are not the step's"),
    (add("scratch", STAND_INS, 0, by=2), "a stand-in is not there"),
    (add("board", N_DEMAND, by=-1), "pins are not the step's"),
    (set_key(3, status=ABSENT), "a queue holds a key that is not queued"),
    (set_key(5, status=ABSENT), "a queue holds a key that is not queued"),
    (set_key(3, queue=PREFETCH), "a queue holds another queue's key"),
    (set_key(5, queue=DEMAND), "a queue holds another queue's key"),
    (set_key(3, previous=-1), "a queue's links disagree"),
    (set_key(7, previous=6), "a queue's links disagree"),
    (add("board", LAST + DEMAND, by=-1), "a queue's end is not its last key"),
    (add("board", LAST + PREFETCH, by=-1), "a queue's end is not its last key"),
    (add("board", BACKLOG), "the backlog is miscounted"),
    (add("board", BACKLOG, by=-1), "the backlog is miscounted"),
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
    cache.keys[2, 8] = -1
    cache.board[LAST + DEMAND] = 2
    cache.board[BACKLOG] -= 1
    assert broken(cache) == "a queued key is lost"


def test_the_queues_begin_at_their_first_key() -> None:
    cache = busy()
    cache.board[FIRST + DEMAND] = 3
    assert broken(cache) == "a queue's links disagree"


def test_slots_beyond_the_limit_stay_for_what_cannot_go_only() -> None:
    """Both of layer 0's keys are the step's, one of them under way. Layer 1 has given a slot up."""

    def shrunk(resizable: bool) -> Cache:
        cache = busy(resizable)
        cache.board[LIMIT] -= 1
        cache.board[EXCESS] += 1
        cache.domains[1, N_FREE] -= 1
        cache.keys[6, PLACE], freed = 2, 3
        assert cache.domains[1, HELD + cache.slots] == freed
        if resizable:
            cache.spare[:2] = 1, freed
        return cache

    check(shrunk(True))
    assert broken(shrunk(False)) == "slots gained"
    cache = shrunk(True)
    cache.keys[0, PINNED] = 0  # resident, and of no step
    assert broken(cache) == "an expert beyond the limit stays that could go"


def test_low_copies_are_of_keys_that_are_there() -> None:
    context = Context(1, 4, 1, slots=2)
    cache = ExpertCache(context, find_policy("hobbit").build(context))
    cache.arrays.keys[1, IS_LOW] = 1
    assert broken(cache.arrays) == "a low copy of a key that is not there"
