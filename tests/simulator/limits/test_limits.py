"""The fewest loads, against exhaustive search; the clairvoyant policies against them."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Kind
from moesim import Workload
from moesim.limits import min_loads
from moesim.limits.loads import domains, windows
from support.clock import drive
from support.workloads import make_workload

N_EXPERTS = 4
Demands = list[tuple[int, tuple[int, ...]]]


@st.composite
def demands_of(draw: st.DrawFn, n_layers: int, widest: int, longest: int = 7) -> Demands:
    """Steps layer after layer; most want one or two experts, some as many as ``widest``."""
    order = st.permutations(range(N_EXPERTS))
    width = st.sampled_from([1, 2, 2, widest])
    n = draw(st.integers(1, longest))
    return [(i % n_layers, tuple(draw(order)[: draw(width)])) for i in range(n)]


def fewest(demands: Demands, scope: str, slots: int, *, bypass: bool, warm: bool = False) -> int:
    """Try every cache content after every step (``warm``: and before the first).

    Without bypass the step's experts stay; of a step wider than the cache, any that fit.
    """
    layers = {layer for layer, _ in demands}
    if scope == "global":
        return _fewest(demands, slots * (1 + max(layers)), bypass, warm)
    alone = ([d for d in demands if d[0] == layer] for layer in layers)
    return sum(_fewest(own, slots, bypass, warm) for own in alone)


def _fewest(demands: Demands, capacity: int, bypass: bool, warm: bool) -> int:
    sets = [frozenset((layer, e) for e in experts) for layer, experts in demands]

    def contents(held: frozenset[Any], wanted: frozenset[Any]) -> Any:
        union = held | wanted
        for kept in combinations(sorted(union), min(capacity, len(union))):
            content = frozenset(kept)
            if bypass or wanted <= content or content <= wanted:
                yield content

    @cache
    def after(i: int, held: frozenset[Any]) -> int:
        if i == len(sets):
            return 0
        wanted = sets[i]
        return len(wanted - held) + min(after(i + 1, c) for c in contents(held, wanted))

    used = sorted(frozenset().union(*sets))
    first = combinations(used, min(capacity, len(used))) if warm else [()]
    return min(after(0, frozenset(content)) for content in first)


def workload_of(demands: Demands) -> Workload:
    return make_workload(demands, 1 + max(layer for layer, _ in demands), N_EXPERTS)


scopes = st.sampled_from(["layer", "global"])
slots_of_each = st.integers(0, N_EXPERTS)


@given(demands_of(2, N_EXPERTS), scopes, slots_of_each, st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_limit_is_what_exhaustive_search_finds(
    demands: Demands, scope: str, slots: int, bypass: bool
) -> None:
    found = min_loads(workload_of(demands), slots, scope, bypass=bypass)
    assert found == fewest(demands, scope, slots, bypass=bypass)


@given(demands_of(2, N_EXPERTS), st.tuples(slots_of_each, slots_of_each), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_limit_of_unequal_shares_is_what_exhaustive_search_finds(
    demands: Demands, shares: tuple[int, int], bypass: bool
) -> None:
    found = min_loads(
        make_workload(demands, 2, N_EXPERTS), 9, "layer", bypass=bypass, shares=shares
    )
    each = [[demand for demand in demands if demand[0] == layer] for layer in range(2)]
    assert found == sum(
        fewest(own, "layer", slots, bypass=bypass)
        for own, slots in zip(each, shares, strict=True)
        if own
    )


@given(demands_of(2, N_EXPERTS), scopes, slots_of_each, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_a_window_begins_with_the_best_content_there_is(
    demands: Demands, scope: str, slots: int, stride: int, count: int
) -> None:
    workload = workload_of(demands)
    counts = windows(workload, *domains(workload, slots, scope), stride, count=count)
    assert len(counts) == -(-len(demands) // stride)
    # A layer that the window skips still has its slots in a global cache.
    n_layers = workload.meta.n_layers if scope == "global" else 1
    for start, row in enumerate(counts.tolist()):
        for i, (loads, fills) in enumerate(row):
            window = demands[start * stride : (start + i + 1) * stride]
            if scope == "global":
                assert loads - fills == _fewest(window, slots * n_layers, True, True)
            else:
                assert loads - fills == fewest(window, scope, slots, bypass=True, warm=True)


def loads_of(policy: str, workload: Workload, slots: int, scope: str) -> int:
    steps = [workload.step(i) for i in range(workload.n_steps)]
    run, _ = drive(policy, workload.context(slots, scope), steps)
    return run.count(Kind.LOAD) + run.count(Kind.SPECULATE)


@given(demands_of(2, N_EXPERTS), scopes, slots_of_each)
@settings(max_examples=150, deadline=None)
def test_belady_bypass_reaches_the_limit(demands: Demands, scope: str, slots: int) -> None:
    workload = workload_of(demands)
    assert loads_of("belady-bypass", workload, slots, scope) == min_loads(workload, slots, scope)


@given(demands_of(2, 2), scopes, st.integers(2, N_EXPERTS))
@settings(max_examples=150, deadline=None)
def test_belady_is_optimal_among_those_that_keep_what_they_load(
    demands: Demands, scope: str, slots: int
) -> None:
    workload = workload_of(demands)
    limit = min_loads(workload, slots, scope, bypass=False)
    assert loads_of("belady", workload, slots, scope) == limit


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "random", "static", "belady"])
@given(demands=demands_of(2, N_EXPERTS), scope=scopes, slots=slots_of_each)
@settings(max_examples=40, deadline=None)
def test_no_policy_beats_the_limit(policy: str, demands: Demands, scope: str, slots: int) -> None:
    workload = workload_of(demands)
    found = loads_of(policy, workload, slots, scope)
    assert found >= min_loads(workload, slots, scope)
    if policy != "static":  # which declines what it does not keep
        assert found >= min_loads(workload, slots, scope, bypass=False)
