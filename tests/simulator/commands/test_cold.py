"""Runs in which every sequence begins with empty caches, against runs of each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import find_policy
from moeroute import open_trace
from moesim import Machine, SimulationError, Workload, load_workload, simulate
from moesim.curves.hit_ratios import hit_curve, shuffled
from moesim.engines.clock import Segment
from moesim.engines.names import Engine
from moesim.limits import min_loads, min_time_ns
from moesim.sizes import sizes_of
from support.machines import machine, machines
from support.traces import traces, write_trace
from support.workloads import make_workload

NS = 1e-9
SUMS = ("steps", "requests", "hits", "late", "misses", "loads", "bypasses", "prefetches")
POLICIES = ["lru", "random", "belady", "belady-bypass", "clairvoyant", "lru-spec:n=1,staging=2"]


def two_sequences(folder: Path) -> Workload:
    """One layer; the second sequence begins with what the first ended with."""
    tokens = [(0, 1, [[e]]) for e in (0, 1, 2)] + [(1, 1, [[e]]) for e in (2, 1, 2, 3)]
    return load_workload(open_trace(write_trace(folder / "t.parquet", tokens, 4)))


def test_a_sequence_is_a_workload_whose_future_ends_with_it(tmp_path: Path) -> None:
    workload = two_sequences(tmp_path)
    assert workload.starts.tolist() == [0, 3]
    first, second = workload.sequences()
    assert (first.keys.tolist(), second.keys.tolist()) == ([0, 1, 2], [2, 1, 2, 3])
    assert second.offsets.tolist() == [0, 1, 2, 3, 4]
    assert second.next_use[0] == 2
    assert first.next_use.min() > first.n_steps  # nothing it uses comes again
    assert [part.keys.tolist() for part in workload.head(4).sequences()] == [[0, 1, 2], [2]]


def test_a_cold_cache_forgets_what_the_last_sequence_left(tmp_path: Path) -> None:
    """0 1 2 | 2 1 2 3 with two slots: warm, the second sequence hits 2, 1 and 2; cold, only 2."""
    workload, lru = two_sequences(tmp_path), find_policy("lru")
    warm, cold = (simulate(workload, lru, machine(), slots=2, cold=c) for c in (False, True))
    assert (warm.hits, cold.hits) == (3, 1)
    assert (warm.limit_loads, cold.limit_loads) == (4, 6)
    assert (warm.cold, cold.cold) == (False, True)
    curves = [hit_curve(workload, "lru", "layer", cold=c)[2] for c in (False, True)]
    assert curves == [3 / 7, 1 / 7]


@given(traces(), machines, st.sampled_from(["layer", "global"]), st.sampled_from(POLICIES))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_cold_run_is_the_sum_of_its_sequences_on_both_engines(
    tmp_path_factory: pytest.TempPathFactory, case: Any, on: Machine, scope: str, policy: str
) -> None:
    (tokens, predicted), n_experts, slots = case
    folder, spec = tmp_path_factory.mktemp("t"), find_policy(policy)

    def load(name: str, chosen: list[int]) -> Workload:
        n_layers = len(tokens[0][2])
        rows = [i * n_layers + layer for i in chosen for layer in range(n_layers)]
        path = write_trace(
            folder / name, [tokens[i] for i in chosen], n_experts, np.array(predicted)[rows]
        )
        return load_workload(open_trace(path), predictions=True)

    def run(workload: Workload, engine: Engine, cold: bool) -> dict[str, Any]:
        segments: list[Segment] = []
        row = simulate(
            workload,
            spec,
            on,
            slots=slots,
            scope=scope,
            engine=engine,
            cold=cold,
            timeline=segments,
        ).row()
        return row | {"segments": sorted(segments)}

    whole = load("whole.parquet", list(range(len(tokens))))
    runs = [run(whole, engine, True) for engine in (Engine.simpy, Engine.replay)]
    assert runs[0] == runs[1]
    alone = []
    for sequence in sorted({token[0] for token in tokens}):
        chosen = [i for i, token in enumerate(tokens) if token[0] == sequence]
        alone.append(run(load(f"{sequence}.parquet", chosen), Engine.replay, False))
    for name in SUMS:
        assert runs[0][name] == sum(one[name] for one in alone), name
    for name in ("time_s", "stall_s"):
        assert runs[0][name] == pytest.approx(sum(one[name] for one in alone), abs=1e-12)
    assert runs[0]["limit_loads"] == sum(one["limit_loads"] for one in alone)
    if not runs[0]["cpu_experts"]:
        assert runs[0]["limit_loads"] <= runs[0]["loads"]
    assert runs[0]["share_of_limit"] <= 1 + 1e-9
    # Lanes go on from sequence to sequence: none does two things at once.
    for one, other in zip(runs[0]["segments"], runs[0]["segments"][1:], strict=False):
        if one[:2] == other[:2]:
            assert one.ends <= other.begins


def test_the_least_time_of_a_cold_run_is_each_sequence_s(tmp_path: Path) -> None:
    workload, on = two_sequences(tmp_path), machine()
    sizes = sizes_of(workload.meta, 10)
    parts = [min_time_ns(part, on, sizes, 1, "layer") for part in workload.sequences()]
    assert min_time_ns(workload, on, sizes, 1, "layer", cold=True) == sum(parts)
    assert min_loads(workload, 1, "layer", cold=True, bypass=False) == 3 + 4


def test_what_is_under_way_at_a_sequence_s_end_takes_no_time(tmp_path: Path) -> None:
    """Layers of 5 ns, experts of 3, copies of 10. The only token of each sequence prefetches
    nothing that is used, and the copy of its last guess would end 10 ns later."""
    tokens = [(s, 1, [[0], [1], [2]]) for s in (0, 1)]
    wrong = [[np.nan] * 4, [0, 0, 0, 9], [0, 0, 0, 9]] * 2
    path = write_trace(tmp_path / "t.parquet", tokens, 4, wrong)
    workload = load_workload(open_trace(path), predictions=True)
    for engine in (Engine.simpy, Engine.replay):
        found = simulate(
            workload,
            find_policy("lru-spec:n=1"),
            machine(),
            slots=1,
            engine=engine,
            cold=True,
            expert_bytes=10,
        )
        (alone, _) = workload.sequences()
        once = simulate(alone, find_policy("lru-spec:n=1"), machine(), slots=1, expert_bytes=10)
        assert once.time_s is not None
        assert found.time_s == 2 * once.time_s
        assert found.loads == 2 * once.loads


def test_a_shuffled_copy_has_sequences_of_the_same_lengths() -> None:
    workload = make_workload([(i % 2, (i % 3,)) for i in range(12)], 2, 4)
    from dataclasses import replace

    cut = replace(workload, starts=np.array([0, 4, 10]))
    assert shuffled(cut, 3).starts.tolist() == [0, 4, 10]


def test_a_journal_is_of_one_cache(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="a journal is of one cache"):
        simulate(
            two_sequences(tmp_path), find_policy("lru"), machine(), slots=1, cold=True, journal=[]
        )
