"""The clairvoyant schedule: what it may do, that it compiles, and how near the limit it comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, Kind, PolicyError, find_policy, replay_journal
from moeroute import open_trace
from moesim import Machine, SimulationError, Workload, load_workload, simulate
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.gap import gap_closed
from moesim.limits import min_time_ns
from moesim.machine.profile import Compute, LinkProfile
from moesim.sizes import sizes_of
from support.clock import drive, scenarios
from support.workloads import make_workload

NS = 1e-9
VARIANTS = ["clairvoyant", "clairvoyant:margin=0", "clairvoyant:delay=4", "clairvoyant:margin=1"]


@pytest.mark.parametrize("policy", VARIANTS)
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_it_keeps_the_rules_whatever_the_clock(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    steps = scenario["steps"]
    context = scenario["context"]._replace(demands=np.concatenate([s.experts for s in steps]))
    cache, seen = drive(policy, context, steps, seed=seed, streams=scenario["streams"], check=True)
    again: list[Any] = []
    twin = ExpertCache(context, find_policy(policy).build(context), observers=[again.append])
    replay_journal(twin, steps, seen.journal)
    assert again == seen.events
    # Knowing the future, it fetches nothing that is not used again.
    after = [{key for s in steps[i:] for key in s.experts.tolist()} for i in range(len(steps))]
    for _, step, key, _ in seen.of_kind(Kind.SPECULATE):
        assert key in after[step]
    assert cache.count(Kind.MISS) == cache.count(Kind.LOAD)


def test_it_needs_the_future() -> None:
    with pytest.raises(PolicyError, match=r"'clairvoyant' needs the future of a recorded trace$"):
        find_policy("clairvoyant").build(Context(2, 4, 2, 2))
    workload = make_workload([(0, [0])], 1, 2)
    with pytest.raises(PolicyError, match="delay and margin must be 0 or more, not -1 and 4"):
        find_policy("clairvoyant:delay=-1").build(workload.context(1, "layer"))


def test_it_fetches_while_others_compute() -> None:
    """Two layers of 5 ns, a slot each, experts of 3, copies of 4; on demand each step takes 12.

    layer 0: 5 | copies: expert 0 5..9, layer 1's expert 0 9..13, and expert 1 13..17 in place of
             expert 0, whose pin drops at 12 | 9..12
    layer 1: 17, there | 17..20, its pin drops
    layer 0: 25, there | 25..28; layer 1's expert 1 is named now and copied 25..29
    layer 1: 33, there | 33..36
    """
    workload = make_workload([(0, [0]), (1, [0]), (0, [1]), (1, [1])], 2, 2)
    machine = Machine(
        "hand", "", "published", LinkProfile(1e9), Compute(layer_s=5 * NS, expert_s=3 * NS)
    )
    options: dict[str, Any] = {"slots": 1, "expert_bytes": 4}
    ahead = simulate(workload, find_policy("clairvoyant"), machine, **options)
    assert ahead.time_s == pytest.approx(36 * NS)
    assert (ahead.hits, ahead.misses, ahead.loads) == (3, 1, 4)
    on_demand = simulate(workload, find_policy("belady"), machine, **options)
    assert on_demand.time_s == pytest.approx(4 * 12 * NS)


def sample(tokens: int) -> Workload:
    return load_workload(open_trace("mixtral-like")).head(tokens)


def link_of(gbytes_per_s: float) -> Machine:
    """Some 0.75 ms of compute a layer of the sample, and a link."""
    compute = Compute(token_s=5e-4, layer_s=1e-4, expert_s=3e-4)
    return Machine("hand", "", "published", LinkProfile(gbytes_per_s * 1e9, 1e-5), compute)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("gbytes_per_s", [6, 25])
def test_it_comes_near_the_limit(gbytes_per_s: float, scope: str) -> None:
    """88 MB experts, half of them cached, on a slow and a middling link."""
    workload, machine, size = sample(60), link_of(gbytes_per_s), 88_000_000
    results = [
        simulate(workload, find_policy(name), machine, slots=4, scope=scope, expert_bytes=size)
        for name in ("lru", "belady", "clairvoyant")
    ]
    limit_s = NS * min_time_ns(workload, machine, sizes_of(workload.meta, size), 4, scope)
    lru, belady, clairvoyant = gap_closed(results)
    assert (lru.loads, lru.time) == (0, 0)
    assert results[1].time_s is not None
    assert results[2].time_s is not None
    assert results[2].time_s < 1.1 * limit_s < results[1].time_s
    assert clairvoyant.time is not None
    assert belady.time is not None
    assert 1 > clairvoyant.time > max(0.9, belady.time)
    assert belady.time > 0
    assert clairvoyant.loads is not None
    assert belady.loads is not None
    assert clairvoyant.loads <= 1
    assert 0 < belady.loads <= 1


def test_a_gap_needs_its_two_ends() -> None:
    workload, machine = sample(10), link_of(25)
    lru, belady = (
        simulate(workload, find_policy(name), machine, slots=4) for name in ("lru", "belady")
    )
    with pytest.raises(SimulationError, match="is measured from 'lru': compare it too"):
        gap_closed([belady])
    with pytest.raises(SimulationError, match="different traces, caches or machines"):
        gap_closed([lru, simulate(workload, find_policy("lru"), machine, slots=2)])
    blind = simulate(workload, find_policy("lfu"), machine, slots=4, limits=False)
    assert blind.limit_loads is None
    with pytest.raises(SimulationError, match="without their limits"):
        gap_closed([lru, blind])
    # With room for every expert each is copied once, and there is nothing to close.
    fitting = simulate(workload, find_policy("lru"), machine, slots=8)
    assert gap_closed([fitting])[0].loads is None


@pytest.mark.slow
def test_compiled_it_does_the_same() -> None:
    known = Compilations(worth_compiling=0)
    workload, machine = sample(40), link_of(25)
    runs = [
        simulate(
            workload,
            find_policy("clairvoyant"),
            machine,
            slots=4,
            engine=engine,
            compilations=known,
        )
        for engine in (Engine.simpy, Engine.replay)
    ]
    assert (Engine.replay, find_policy("clairvoyant").policy) in known.proven
    assert runs[0] == runs[1]
