"""Policies that evict by score: the cache's own choice is the one that asking them gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import ByScore, Composite, Context, ExpertCache, Policy, PolicyError
from moepolicy.library.clairvoyant.belady import Belady
from moepolicy.library.frequency.lfu import Lfu
from moepolicy.library.gate.next_gate import NextGate
from moepolicy.library.recency.fifo import Fifo
from moepolicy.library.recency.lru import Lru
from moesim.conformance.clock import RandomClock
from numpy.typing import NDArray
from support.clock import context_for, make_steps, scenarios

CLASSES = [Lru, Lfu, Fifo, Belady]


def asked(cls: Any) -> Any:
    """The same policy, which the cache has to ask."""

    class Asked(cls):  # type: ignore[misc]
        def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
            return int(super().victim(layer, incoming, candidates))

    return Asked


def events(policy: Policy, scenario: Any, seed: int, *, resizes: bool) -> tuple[Any, bool]:
    seen: list[Any] = []
    context = scenario["context"]
    most = context.n_experts if resizes else None
    cache = ExpertCache(context, policy, observers=[seen.append], max_slots=most)
    clock = RandomClock(cache, seed, streams=scenario["streams"], resizes=resizes, look=cache.check)
    clock.run((step, None) for step in scenario["steps"])
    return seen, cache.arrays.scoring


@pytest.mark.parametrize("cls", CLASSES)
@given(scenario=scenarios(), seed=st.integers(0, 999), resizes=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_cache_chooses_what_the_policy_would(
    cls: Any, scenario: Any, seed: int, resizes: bool
) -> None:
    context = scenario["context"]
    found, scoring = events(cls(context), scenario, seed, resizes=resizes)
    expected, asks = events(asked(cls)(context), scenario, seed, resizes=resizes)
    assert (scoring, asks) == (True, False)
    assert found == expected


@pytest.mark.parametrize("cls", CLASSES)
@given(scenario=scenarios(), seed=st.integers(0, 999), staged=st.booleans())
@settings(max_examples=25, deadline=None)
def test_with_guesses_too(cls: Any, scenario: Any, seed: int, staged: bool) -> None:
    context = scenario["context"]

    def made(base: Policy) -> Policy:
        policy = Composite(base, NextGate(context, 2))
        policy.stage_prefetches = staged
        return policy

    found, scoring = events(made(cls(context)), scenario, seed, resizes=False)
    expected, asks = events(made(asked(cls)(context)), scenario, seed, resizes=False)
    assert (scoring, asks) == (True, False)
    assert found == expected


def test_a_score_that_changes_behind_the_cache_s_back_is_found() -> None:
    class Meddling(Lru):
        def on_hit(self, key: int, now: int) -> None:
            self.eviction_score[:] = now

    steps = make_steps([(0, [0, 1]), (0, [2]), (0, [2])], 4)
    context = context_for(steps, 1, 4, 2, 3, "layer")
    cache = ExpertCache(context, Meddling(context))
    clock = RandomClock(cache, 0, streams=1, look=cache.check)
    with pytest.raises(AssertionError, match="may have changed that of another key"):
        clock.run((step, None) for step in steps)


@pytest.mark.parametrize("score", [None, np.zeros(4, np.int32), np.zeros(3, np.int64)])
def test_scores_that_are_none_are_told(score: Any) -> None:
    class Wrong(ByScore):
        def __init__(self, context: Context) -> None:
            if score is not None:
                self.eviction_score = score

    context = Context(1, 4, 1, 2)
    with pytest.raises(PolicyError, match=r"Wrong evicts by score, .* no int64 array of 4 entries"):
        ExpertCache(context, Wrong(context))
