"""The limit, against exhaustive search; the clairvoyant policies against the limit."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Kind, next_use
from moesim.limits import _count_loads
from support.clock import context_for, drive, make_steps


def fewest(demands: list[tuple[int, ...]], capacity: int, *, bypass: bool) -> int:
    """Try every cache content after every step. With no bypass, what is loaded is kept while
    its step lasts and whatever leaves makes room for a load."""

    @cache
    def after(i: int, held: frozenset[int]) -> int:
        if i == len(demands):
            return 0
        wanted = frozenset(demands[i])
        missing = len(wanted - held)
        if bypass:
            union = held | wanted
            size = min(capacity, len(union))
            nexts = map(frozenset, combinations(sorted(union), size))
        else:
            leave = max(0, len(held | wanted) - capacity)
            idle = sorted(held - wanted)
            nexts = ((held | wanted) - frozenset(gone) for gone in combinations(idle, leave))
        return missing + min(after(i + 1, content) for content in nexts)

    return after(0, frozenset())


@st.composite
def small_traces(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], int]:
    n_experts = draw(st.integers(3, 5))
    top_k = draw(st.integers(1, 2))
    demand = st.permutations(range(n_experts)).map(lambda order: tuple(order[:top_k]))
    return draw(st.lists(demand, min_size=1, max_size=7)), draw(st.integers(top_k, n_experts - 1))


def loads_of(policy: str, demands: list[tuple[int, ...]], slots: int) -> int:
    steps = make_steps([(0, d) for d in demands], 6)
    context = context_for(steps, 1, 6, len(demands[0]), slots, "layer")
    run, _ = drive(policy, context, steps)
    return run.count(Kind.LOAD)


def limit_of(demands: list[tuple[int, ...]], slots: int) -> int:
    keys = np.array([e for d in demands for e in d], np.int32)
    offsets = np.cumsum([0, *map(len, demands)])
    steps: Any = np.zeros(len(demands), np.int32)
    return _count_loads(keys, next_use(keys, offsets), offsets, steps, 1, slots, 6)


@given(small_traces())
@settings(max_examples=150, deadline=None)
def test_the_limit_is_what_exhaustive_search_finds(case: tuple[Any, int]) -> None:
    demands, slots = case
    assert limit_of(demands, slots) == fewest(demands, slots, bypass=True)


@given(small_traces())
@settings(max_examples=150, deadline=None)
def test_belady_bypass_reaches_the_limit(case: tuple[Any, int]) -> None:
    demands, slots = case
    assert loads_of("belady-bypass", demands, slots) == limit_of(demands, slots)


@given(small_traces())
@settings(max_examples=150, deadline=None)
def test_belady_is_optimal_among_those_that_keep_what_they_load(case: tuple[Any, int]) -> None:
    demands, slots = case
    assert loads_of("belady", demands, slots) == fewest(demands, slots, bypass=False)


@given(small_traces(), st.sampled_from(["lru", "lfu", "fifo", "random", "static"]))
@settings(max_examples=100, deadline=None)
def test_no_policy_beats_the_limit(case: tuple[Any, int], policy: str) -> None:
    demands, slots = case
    assert loads_of(policy, demands, slots) >= limit_of(demands, slots)
