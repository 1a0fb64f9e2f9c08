"""The simulated machine: timelines worked out by hand, and what must hold on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Call, Event, ExpertCache, find_policy, replay_journal
from moeroute import DECODE, PROMPT, open_trace
from moesim import Machine, Workload, load_workload, simulate
from moesim.machine.costs import Sizes, costs_of
from support.machines import NS, machine, machines
from support.traces import decoded, traces, write_trace


def replay(workload: Workload, policy: str, on: Machine, slots: int, **options: Any) -> Any:
    return simulate(workload, find_policy(policy), on, slots=slots, **options)


def test_a_miss_stalls_and_a_hit_does_not(tmp_path: Path) -> None:
    """One layer, top-1, one slot. Times: layer 5, copy 10, expert 3.

    token 0, expert 0: 5 | copy 5..15, stalled 10 | 15..18
    token 1, expert 0: 23, hit | 23..26
    token 2, expert 1: 31 | copy 31..41, stalled 10 | 41..44
    """
    path = write_trace(tmp_path / "t.parquet", decoded([[0]], [[0]], [[1]]), 2)
    result = replay(load_workload(open_trace(path)), "lru", machine(), 1)
    assert (result.hits, result.misses, result.loads) == (1, 2, 2)
    assert result.time_s == pytest.approx(44 * NS)
    assert result.stall_s == pytest.approx(20 * NS)
    assert result.link_busy_s == pytest.approx(20 * NS)
    assert result.tokens_per_s == pytest.approx(3 / (44 * NS))


def test_hits_compute_while_misses_travel(tmp_path: Path) -> None:
    """Top-2, two slots: token 1 finds expert 0 and misses expert 2, which copies 36..46 while
    expert 0 computes 36..39; the stall is what is left, 7.

    token 0: 5 | copies 5..15, 15..25 | expert 0 15..18, expert 1 25..28 (stalls 10 + 7)
    token 1: 33 | expert 0 33..36, expert 2 copied 33..43, stalled 7, 43..46
    """
    path = write_trace(tmp_path / "t.parquet", decoded([[0, 1]], [[0, 2]]), 3)
    result = replay(load_workload(open_trace(path)), "lru", machine(), 2)
    assert result.time_s == pytest.approx(46 * NS)
    assert result.stall_s == pytest.approx((10 + 7 + 7) * NS)


def test_latencies_of_two_streams_overlap_and_bytes_do_not(tmp_path: Path) -> None:
    """Two misses, latency 4, copy 10: one stream 5 + 14 + 14, two streams 5 + 4 + 10 + 10."""
    path = write_trace(tmp_path / "t.parquet", decoded([[0, 1]]), 2)
    workload = load_workload(open_trace(path))
    one = replay(workload, "lru", machine(latency_s=4 * NS), 2)
    two = replay(workload, "lru", machine(latency_s=4 * NS, streams=2), 2)
    assert one.time_s == pytest.approx((5 + 14 + 14 + 3) * NS)
    assert two.time_s == pytest.approx((5 + 4 + 10 + 10 + 3) * NS)


def test_a_copy_that_waited_for_its_stream_has_no_latency(tmp_path: Path) -> None:
    """Latency 4, copy 10, one layer, top-2.

    token 0: 5 | copies 5..19, and behind it 19..29 | experts 19..22, 29..32
    token 1: 37, the link idle before | copies 37..51, 51..61 | experts 51..54, 61..64
    """
    path = write_trace(tmp_path / "t.parquet", decoded([[0, 1]], [[2, 3]]), 4)
    workload = load_workload(open_trace(path))
    queued = replay(workload, "lru", machine(latency_s=4 * NS, back_to_back=True), 2)
    assert queued.time_s == pytest.approx(64 * NS)
    each = replay(workload, "lru", machine(latency_s=4 * NS), 2)
    assert each.time_s == pytest.approx((64 + 2 * 4) * NS)


def test_an_arrival_costs_compute_that_stood_still_for_it(tmp_path: Path) -> None:
    """Top-2, two slots, expert 3, copy 10; 6 from an arrival that was waited for to its compute.

    token 0: 5 | copies 5..15, 15..25 | waking 15..21, expert 0 21..24; waking 25..31, 31..34
    token 1: 39 | expert 0 39..42, expert 2 copied 39..49, waking 49..55, 55..58
    token 2: 63, both are there | 63..66, 66..69
    """
    path = write_trace(tmp_path / "t.parquet", decoded([[0, 1]], [[0, 2]], [[2, 0]]), 3)
    result = replay(load_workload(open_trace(path)), "lru", machine(arrival_s=6 * NS), 2)
    assert result.time_s == pytest.approx(69 * NS)
    assert result.stall_s == pytest.approx((10 + 6 + 1 + 6 + 7 + 6) * NS)


def test_an_arrival_that_compute_did_not_wait_for_costs_nothing(tmp_path: Path) -> None:
    """Copies take 2, an expert 3: the second arrives while the first is computed.

    5 | copies 5..7, 7..9 | waking 7..8, expert 8..11, 11..14
    """
    path = write_trace(tmp_path / "t.parquet", decoded([[0, 1]]), 2)
    workload = load_workload(open_trace(path))
    result = replay(workload, "lru", machine(bytes_per_s=5e9, arrival_s=1 * NS), 2)
    assert result.time_s == pytest.approx(14 * NS)
    assert result.stall_s == pytest.approx(3 * NS)


def two_layers_guessed(tmp_path: Path) -> Workload:
    """Two tokens over two layers of four experts; layer 1 is guessed right, then wrong."""
    nothing = [np.nan] * 4
    guesses = [nothing, [9.0, 0, 0, 0], nothing, [9.0, 0, 0, 0]]
    path = write_trace(
        tmp_path / "p.parquet", decoded([[0], [0]], [[0], [1]]), 4, predicted=guesses
    )
    return load_workload(open_trace(path), predictions=True)


def test_a_guess_travels_behind_demand_and_is_late(tmp_path: Path) -> None:
    """Top-1, one slot, copies of 10 ns.

    layer 0: 5 | demand copies 5..15, the guess for layer 1 15..25 | expert 15..18
    layer 1: 23, its expert in flight until 25: late, stalled 2 | 25..28
    token 1: layer 0 hit 33..36, guess again resident; layer 1 at 41 wants another: 41..51..54
    """
    result = replay(two_layers_guessed(tmp_path), "lru-spec:n=1", machine(), 1)
    assert (result.hits, result.late, result.misses) == (1, 1, 2)
    assert (result.prefetches, result.useless_prefetches) == (1, 0)
    assert result.time_s == pytest.approx(54 * NS)
    assert result.stall_s == pytest.approx((10 + 2 + 10) * NS)


def test_a_prompt_is_one_step_a_layer(tmp_path: Path) -> None:
    tokens = [(0, PROMPT, [[0, 1]]), (0, PROMPT, [[1, 2]]), (0, DECODE, [[2, 0]])]
    tokens += [(1, PROMPT, [[3, 0]])]
    path = write_trace(tmp_path / "t.parquet", tokens, 4)
    workload = load_workload(open_trace(path))
    assert workload.n_steps == 3
    assert workload.tokens.tolist() == [2, 1, 1]
    assert workload.decode.tolist() == [False, True, False]
    # Summed weights: expert 1 has 0.4 + 0.6, expert 0 has 0.6, expert 2 has 0.4.
    assert workload.keys[:3].tolist() == [1, 0, 2]
    assert workload.routed[:3].tolist() == [2, 1, 1]
    assert (workload.n_prompt, workload.n_decoded) == (3, 1)


POLICIES = ["lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass"]


@given(traces(), machines, st.sampled_from([*POLICIES, "lru-spec", "lru-spec:n=1,staging=1"]))
@settings(max_examples=150, deadline=None)
def test_time_adds_up_and_the_journal_reproduces_the_run(
    tmp_path_factory: pytest.TempPathFactory, case: Any, on: Machine, policy: str
) -> None:
    (tokens, predicted), n_experts, slots = case
    path = write_trace(tmp_path_factory.mktemp("t") / "t.parquet", tokens, n_experts, predicted)
    workload = load_workload(open_trace(path), predictions=True)
    events: list[Event] = []
    journal: list[tuple[int, int]] = []
    result = replay(workload, policy, on, slots, observers=(events.append,), journal=journal)
    calls = len(workload.keys)
    costs = costs_of(workload, on, Sizes(10, 5, 0, 0), predicting=policy.startswith("lru-spec"))
    busy = int(costs.gate_ns(slice(None)).sum() + costs.compute_ns(slice(None)).sum())
    assert result.time_s == pytest.approx(busy * NS + (result.gates_s or 0) + result.stall_s)
    assert result.requests == calls
    assert result.loads - result.prefetches == result.misses
    assert result.loads >= result.limit_loads

    again: list[Event] = []
    context = workload.context(slots, "layer")
    cache = ExpertCache(context, find_policy(policy).build(context), observers=[again.append])
    replay_journal(cache, [workload.step(i) for i in range(workload.n_steps)], journal)
    assert again == events


@given(traces(), machines, machines, st.sampled_from(POLICIES))
@settings(max_examples=80, deadline=None)
def test_without_prefetching_the_machine_changes_only_the_time(
    tmp_path_factory: pytest.TempPathFactory, case: Any, one: Machine, other: Machine, policy: str
) -> None:
    (tokens, _), n_experts, slots = case
    path = write_trace(tmp_path_factory.mktemp("t") / "t.parquet", tokens, n_experts)
    workload = load_workload(open_trace(path))
    seen: list[list[Event]] = [[], []]
    for on, events in zip((one, other), seen, strict=True):
        replay(workload, policy, on, slots, observers=(events.append,))
    assert seen[0] == seen[1]


def test_a_guess_waits_behind_demand(tmp_path: Path) -> None:
    """With no compute at all, the guess for layer 1 is queued with layer 0's miss, and copied
    after it although the link is free for both."""
    journal: list[tuple[int, int]] = []
    at_once = machine(layer_s=0, expert_s=0)
    replay(two_layers_guessed(tmp_path), "lru-spec:n=1", at_once, 1, journal=journal)
    assert [key for call, key in journal if call == Call.FINISH][:2] == [0, 4]
