"""Decisions found once and timed for many machines, against a run on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moepolicy import PolicySpec, find_policy
from moepolicy.counts import counts_of
from moepolicy.library.recency.lru import Lru
from moesim import Machine, Workload
from moesim.engines import choose as engines
from moesim.engines.compilations import Compilations
from moesim.engines.onepass import decide, timeless
from moesim.machine.costs import Costs, Sizes, costs_of
from support.machines import machine, machines
from support.workloads import make_workload

SIZES = Sizes(10, 5, 0, 0)
POLICIES = ["lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass"]
POLICIES.append(f"{Path(__file__).parents[2] / 'support' / 'policies.py'}:Sharing")

routings = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.permutations(range(4)).map(lambda order: tuple(order[:k])), min_size=1, max_size=16
    )
)


def workload_of(routing: list[tuple[int, ...]]) -> Workload:
    return make_workload([(i % 2, experts) for i, experts in enumerate(routing)], 2, 4)


def costs(workload: Workload, on: Machine) -> Costs:
    return costs_of(workload, on, SIZES, predicting=False)


@given(
    routings,
    st.lists(machines, min_size=1, max_size=4),
    st.sampled_from(["layer", "global"]),
    st.integers(0, 4),
    st.sampled_from(POLICIES),
)
@settings(max_examples=150, deadline=None)
def test_one_pass_gives_every_machine_its_own_run(
    routing: list[tuple[int, ...]], on: list[Machine], scope: str, slots: int, policy: str
) -> None:
    workload, spec = workload_of(routing), find_policy(policy)
    on = [replace(one, disk=None) for one in on]
    assert timeless(workload, spec, on[0], slots, scope)
    known = Compilations()
    found = decide(workload, spec, costs(workload, on[0]), slots, scope, compilations=known)
    assert found.kinds.sum() == workload.n_steps
    for one in on:
        own = costs(workload, one)
        cache, clock = engines.run(
            workload, spec, workload.context(slots, scope), own, compilations=known
        )
        assert found.counts == counts_of(cache)
        assert found.clock(own) == clock


@given(routings, machines, st.sampled_from([*POLICIES, "lru-spec", "fiddler", "clairvoyant"]))
@settings(max_examples=50, deadline=None)
def test_what_depends_on_time_is_told(
    routing: list[tuple[int, ...]], on: Machine, policy: str
) -> None:
    assume(policy not in POLICIES or on.disk is not None)
    assert not timeless(workload_of(routing), find_policy(policy), on, 2, "layer")


@pytest.mark.parametrize("need", ["speed", "bytes"])
def test_what_a_policy_is_told_of_the_machine_is_not_for_all_machines(need: str) -> None:
    class Needing(Lru):
        requires = frozenset({need})

    spec = PolicySpec("needing", Needing)
    assert not timeless(workload_of([(0,), (1,)]), spec, machine(), 2, "layer")
    assert timeless(workload_of([(0,), (1,)]), find_policy("lru"), machine(), 2, "layer")


def test_prompts_are_no_two_alike() -> None:
    prompt = make_workload([(0, (0, 1)), (0, (0, 1))], 1, 2, tokens=[2, 1])
    assert not timeless(prompt, find_policy("lru"), machine(), 1, "layer")


def test_a_long_trace_is_looked_at_a_stretch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of([(i * i % 4, (i * i + 1) % 4) for i in range(50)])
    spec, on = find_policy("lru"), costs(workload, machine())
    known = Compilations()
    whole = decide(workload, spec, on, 2, "layer", compilations=known)
    monkeypatch.setattr(engines, "CHUNK", 7)
    again = decide(workload, spec, on, 2, "layer", compilations=known)
    assert np.array_equal(again.kinds, whole.kinds)
