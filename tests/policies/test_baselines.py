"""The classic policies: the misses an independent implementation counts, and pins and guesses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moepolicy import Context, Kind, PolicyError, find_policy
from moesim.engines.timeless import decisions
from support.clock import context_for, drive, make_steps
from support.workloads import make_workload

N_KEYS = 40


def loops_and_favourites(n: int) -> list[int]:
    """A seeded mix of loops over some keys and of a skewed choice among all, which shifts.

    Its own generator: NumPy's may change from one version to the next.
    """
    state = 1
    keys: list[int] = []
    while len(keys) < n:
        state = state * 48271 % 2_147_483_647
        start, width = state % N_KEYS, 2 + state // N_KEYS % 30
        if state // 4096 % 2:
            keys += [(start + i) % N_KEYS for i in range(width)] * 2
        else:
            for _ in range(60):
                state = state * 48271 % 2_147_483_647
                keys.append((start + (state % 1000) ** 3 * N_KEYS // 10**9) % N_KEYS)
    return keys[:n]


# Misses that libCacheSim 0.3.5 counts on 3,000 steps of one key, with 20 and with 30 slots.
MISSES = {
    "lru": (1413, 664),
    "fifo": (1367, 624),
    "lfu-aging:aging=0": (1366, 612),
    "clock": (1377, 642),
    "sieve": (1354, 670),
    "2q": (1297, 601),
    "s3-fifo": (1325, 661),
    "arc": (1420, 666),
    "belady": (631, 256),
}


@pytest.mark.parametrize("policy", MISSES)
def test_one_key_at_a_time_the_misses_are_the_textbook_s(policy: str) -> None:
    workload = make_workload([(0, [key]) for key in loops_and_favourites(3000)], 1, N_KEYS)
    counted = [
        decisions(
            workload, find_policy(policy), workload.context(slots, "layer"), compile=False
        ).counters[Kind.MISS]
        for slots in (20, 30)
    ]
    assert tuple(counted) == MISSES[policy]


def victims(policy: str, demands: list[list[int]], slots: int, n_experts: int = 6) -> list[int]:
    steps = make_steps([(0, experts) for experts in demands], n_experts)
    context = context_for(steps, 1, n_experts, 1, slots, "layer")
    _, seen = drive(policy, context, steps, check=True)
    return [key for _, _, key, _ in seen.of_kind(Kind.EVICT)]


@pytest.mark.parametrize(
    ("policy", "slots", "demands", "gone"),
    [
        # 0 is the oldest and unused since, but pinned by the step that needs a slot for 2.
        ("clock", 2, [[0], [1], [2, 0]], [1]),
        ("sieve", 2, [[0], [1], [2, 0]], [1]),
        # The hand rests on 1 after 0 went; 1 is pinned, so it goes on to 2 and stays beyond:
        # 1 has outlived 3, which came later.
        ("sieve", 3, [[0], [1], [2], [3], [4, 1], [5]], [0, 2, 3]),
        # Both used again: a round clears them, and the first loaded goes.
        ("clock", 2, [[0], [1], [0], [1], [2]], [0]),
        # 0 was used again, so it is protected, and 1 goes although used later.
        ("slru:protected=0.5", 2, [[0], [0], [1], [2]], [1]),
        # 1 would go, but is pinned: what is protected is next.
        ("slru:protected=0.5", 2, [[0], [0], [1], [2, 1]], [0]),
        # Protected, 0 is displaced by 1: on probation it is the most recent, so 2 goes first.
        ("slru:protected=0.34", 3, [[0], [2], [1], [0], [1], [3], [4]], [2, 0]),
        # Loaded again soon after it went, 0 is in the main queue and outlives 2 and 3.
        ("2q:first=0.34,ghosts=1", 3, [[0], [1], [2], [3], [0], [4], [5]], [0, 1, 2, 3]),
        # 0 fills the small queue, 1 is in the main one. Whichever the step pins, the other goes.
        ("s3-fifo:small=0.5", 2, [[0], [1], [2, 1]], [0]),
        ("s3-fifo:small=0.5", 2, [[0], [1], [2, 0]], [1]),
        # Of 1 and 2, both in their first pass, the one that this pass has not used.
        ("least-stale", 2, [[1], [2], [3, 2]], [1]),
        # Loaded first, gone first, although used since.
        ("least-stale", 2, [[1], [2], [1], [3]], [1]),
        # Two uses of 0 long ago are worth less than one of 1 just now; undecayed, more.
        ("class-lru:half_life=1", 3, [[0], [0], [2], [2], [2], [1], [3]], [0]),
        ("class-lru:half_life=100", 3, [[0], [0], [2], [2], [2], [1], [3]], [1]),
        # 2 uses, 6 steps ago; then 2 of 1, 4 ago, are as many as 1 of 3, 2 ago: the lowest key.
        ("lfru", 3, [[0], [0], [1], [2], [1], [2], [3], [4]], [0, 1]),
        # 1 starts from its victim's worth, equals 0's two uses and is later; without aging 0 stays.
        ("lfu-aging", 2, [[0], [0], [2], [1], [3], [4], [5]], [2, 0, 1, 3]),
        ("lfu-aging:aging=0", 2, [[0], [0], [2], [1], [3], [4], [5]], [2, 1, 3, 4]),
    ],
)
def test_who_goes(policy: str, slots: int, demands: list[list[int]], gone: list[int]) -> None:
    assert victims(policy, demands, slots) == gone


def spare(policy: str, calls: list[tuple[str, int]], candidates: list[int], incoming: int) -> int:
    """Who goes after ``calls``: a guess, a load or a hit of a key."""
    made: Any = find_policy(policy).build(Context(1, 6, 1, 3))
    for now, (call, key) in enumerate(calls, start=1):
        if call == "hit":
            made.on_hit(key, now)
        else:
            made.on_load(key, call == "guess", now)
    return int(made.victim(0, incoming, np.array(candidates, np.int32)))


@pytest.mark.parametrize("policy", ["clock", "sieve", "slru:protected=0.5", "arc"])
def test_the_first_use_of_a_guess_is_not_a_second_use(policy: str) -> None:
    loaded = [("load", 0), ("load", 1), ("hit", 0)]
    assert spare(policy, loaded, [0, 1], 2) == 1
    guessed = [("guess", 0), ("load", 1), ("hit", 0)]
    # As if loaded when it was used: the oldest where only loads count, else the newest.
    assert spare(policy, guessed, [0, 1], 2) == (0 if policy in ("clock", "sieve") else 1)
    again = [*guessed, ("hit", 1), ("load", 2), ("hit", 0)]
    assert spare(policy, again, [0, 2], 3) == 2


def test_arc_does_not_remember_a_guess_that_was_wrong() -> None:
    arc: Any = find_policy("arc").build(Context(1, 6, 1, 3))
    for key, wrong in ((0, True), (1, False)):
        arc.on_load(key, wrong, key + 1)
        arc.on_evict(key)
    arc.on_load(0, False, 3)
    assert arc.target.max() == 0
    arc.on_load(1, False, 4)
    assert arc.target.max() == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("slru:protected=1.5", "slru: protected must be a share from 0 to 1, not 1.5"),
        ("2q:first=-1.0", "2q: first must be a share"),
        ("s3-fifo:ghosts=2.0", "s3-fifo: ghosts must be a share"),
        ("lfu-aging:aging=2", "aging must be 0 or 1, not 2"),
        ("class-lru:half_life=0", "half_life must be 1 or more, not 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(1, 6, 1, 3))
