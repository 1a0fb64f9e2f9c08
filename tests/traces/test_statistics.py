"""The statistics, on traces small enough to count by hand, and against slow plain versions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeroute import Rows, Trace, TraceError, TraceMeta, TraceWriter, open_trace
from moeroute.hitratio import hit_ratios
from moeroute.importers import import_npz
from moeroute.schema import NO_EXPERT
from moeroute.statistics import (
    Routing,
    gate_weights,
    locality,
    popularity,
    read_routing,
    recall,
)
from moeroute.summary import summarize
from numpy.typing import NDArray
from support.tracekit import make_meta, make_rows, write


def routing_of(experts: list[list[list[int]]], n_experts: int) -> Routing:
    """One sequence from experts[token][layer]."""
    array = np.array(experts, dtype=np.int64)
    token = np.repeat(np.arange(len(array), dtype=np.uint64)[:, None], array.shape[1], axis=1)
    return Routing(array, token, np.ones(token.shape, dtype=np.bool_), n_experts)


def trace_of(path: Path, meta: TraceMeta, rows: Rows) -> Trace:
    write(path, meta, rows)
    return open_trace(path)


def one_layer_rows(
    experts: list[list[int]],
    sequence: list[int] | None = None,
    position: list[int] | None = None,
    predicted: NDArray[np.float16] | None = None,
    phase: list[int] | None = None,
) -> Rows:
    n = len(experts)
    return Rows(
        sequence=np.array(sequence or [0] * n, dtype=np.uint32),
        position=np.array(position or range(n), dtype=np.uint32),
        phase=np.array(phase or [1] * n, dtype=np.uint8),
        token_id=None,
        layer=np.zeros(n, dtype=np.uint16),
        experts=np.array(experts, dtype=np.uint16),
        weights=np.array([[0.75, 0.25]] * n, dtype=np.float32),
        predicted=() if predicted is None else (predicted,),
    )


def test_locality_counts_pairs_of_one_sequence(tmp_path: Path) -> None:
    # Token 2 of the second sequence is not there: 1 and 3 are two apart, not neighbours.
    rows = one_layer_rows(
        [[0, 1], [0, 2], [2, 0], [3, 1], [1, 3], [1, 2]],
        sequence=[0, 0, 0, 1, 1, 1],
        position=[0, 1, 2, 0, 1, 3],
    )
    near = locality(read_routing(trace_of(tmp_path / "t", make_meta(n_layers=1), rows)), (1, 2, 9))
    # lag 1: {0} of (0, 2); both of (2, 0); both of (1, 3). lag 2: {0} of (2, 0); {1} of (1, 2).
    np.testing.assert_allclose(near.by_layer, [[5 / 6, 2 / 4, np.nan]])
    np.testing.assert_allclose(near.mean, [5 / 6, 2 / 4, np.nan])
    assert near.any_by_layer.tolist() == [1.0]
    assert near.top1_by_layer.tolist() == [1 / 3]


def test_layers_with_missing_rows_keep_their_own_streams(tmp_path: Path) -> None:
    meta = make_meta(n_layers=2, missing_rows=1)
    rows = make_rows(make_meta(n_layers=2), 1, 4)
    whole = rows.columns() | {"phase": np.ones(8, dtype=np.uint8)}
    kept = [i for i in range(8) if i != 3]  # token 1 has lost layer 1
    columns: dict[str, Any] = {name: column[kept] for name, column in whole.items()}
    cut = Rows(**columns)
    routing = read_routing(trace_of(tmp_path / "t", meta, cut))
    assert routing.valid.sum(axis=0).tolist() == [4, 3]
    layer_1 = rows.experts[1::2]
    np.testing.assert_array_equal(routing.experts[:3, 1], layer_1[[0, 2, 3]])
    pairs = [(2, 3)]  # the only neighbours left
    expected = np.mean([[e in layer_1[a] for e in layer_1[b]] for a, b in pairs])
    assert locality(routing, (1,)).by_layer[1, 0] == expected
    assert hit_ratios(routing, [3]).lru[0] == pytest.approx(
        sum(plain_lru(routing.experts[:n, layer], 3) for layer, n in enumerate([4, 3])) / 14
    )


def test_decode_is_what_is_measured_unless_there_is_none(tmp_path: Path) -> None:
    rows = one_layer_rows([[0, 1], [2, 3], [1, 0]], phase=[0, 0, 1])
    trace = trace_of(tmp_path / "t", make_meta(n_layers=1), rows)
    assert read_routing(trace).experts.tolist() == [[[1, 0]]]
    assert len(read_routing(trace, phase=0).experts) == 2
    rows = one_layer_rows([[0, 1], [2, 3]], phase=[0, 0])
    trace = trace_of(tmp_path / "u", make_meta(n_layers=1), rows)
    assert len(read_routing(trace).experts) == 2
    with pytest.raises(TraceError, match="no decode tokens"):
        read_routing(trace, phase=1)


def test_popularity() -> None:
    use = popularity(routing_of([[[0, 1], [0, 1]], [[0, 2], [2, 3]]], 4))
    assert use.shares.tolist() == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    assert use.hottest.tolist() == [0.5, 0.25]
    np.testing.assert_allclose(use.entropy, [0.75, 1.0])  # 1.5 of 2 bits


def test_gate_weights_are_shares_of_their_sum(tmp_path: Path) -> None:
    rows = one_layer_rows([[0, 1], [0, 2], [2, 0]])
    assert rows.weights is not None
    rows.weights[:] = [[0.75, 0.25], [0.2, 0.0], [0.6, 0.6]]
    gate = gate_weights(trace_of(tmp_path / "t", make_meta(n_layers=1), rows), (0.7, 0.9))
    assert gate.mean_top1 == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert gate.share_at_least == {0.7: pytest.approx(2 / 3), 0.9: pytest.approx(1 / 3)}


def test_recall_by_count(tmp_path: Path) -> None:
    nan = np.nan
    predicted = np.array([[4, 3, 2, 1], [1, 1, 1, 1], [nan] * 4], dtype=np.float16)
    rows = one_layer_rows([[1, 3], [0, 2], [0, 1]], predicted=predicted)
    trace = trace_of(tmp_path / "t", make_meta(n_layers=1, horizon=1), rows)
    found = recall(trace)
    assert found.counts == (1, 2, 3, 4)
    # Row 0 wants ranks 1 and 3, row 1 (all equal, so lowest first) ranks 0 and 2; row 2 has none.
    np.testing.assert_allclose(found.by_layer[0, :, 0], [1 / 4, 2 / 4, 3 / 4, 1.0])
    np.testing.assert_allclose(found.top1_by_layer[0, :, 0], [1 / 2, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(found.mean[0], [1 / 4, 2 / 4, 3 / 4, 1.0])


def test_recall_needs_predictions(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", make_meta(n_layers=1), one_layer_rows([[0, 1]]))
    with pytest.raises(TraceError, match="no column predicted_logits_1, which the recall of"):
        recall(trace)


def test_layers_without_a_prediction_do_not_count(tmp_path: Path) -> None:
    meta = make_meta(horizon=2)
    found = recall(trace_of(tmp_path / "t", meta, make_rows(meta)), (1, 4))
    assert np.isnan(found.by_layer[0, 0]).tolist() == [True, False, False]
    assert np.isnan(found.by_layer[1, 0]).tolist() == [True, True, False]
    np.testing.assert_allclose(found.mean[:, 1], 1.0)


def test_hit_ratios_by_hand() -> None:
    # One layer, K=1:      0  1  2  0  1  (C=2)
    # LRU:                 m  m  m  m  m
    # Belady, always kept: m  m  m  h  m   2 replaces 1 (needed later than 0)
    # Belady with bypass:  m  m  m  h  h   2 is not kept
    hits = hit_ratios(routing_of([[[e]] for e in [0, 1, 2, 0, 1]], 3), [2])
    assert hits.lru.tolist() == [0.0]
    assert hits.belady.tolist() == [1 / 5]
    assert hits.belady_bypass.tolist() == [2 / 5]


def test_the_heaviest_expert_ends_most_recent() -> None:
    # With C=3, (3, 0) evicts one of (2, 1): 1, the lighter, so 2 hits afterwards.
    hits = hit_ratios(routing_of([[[2, 1]], [[3, 0]], [[2, 0]]], 4), [3])
    assert hits.lru.tolist() == [2 / 6]


def test_a_cache_below_a_step_is_refused() -> None:
    with pytest.raises(TraceError, match="1 experts a layer cannot hold a step's 2"):
        hit_ratios(routing_of([[[0, 1]]], 4), [1])
    with pytest.raises(
        TraceError, match="a cache of 5 experts a layer: a layer has no more than 4"
    ):
        hit_ratios(routing_of([[[0, 1]]], 4), [4, 5])


def plain_lru(steps: NDArray[np.int64], size: int) -> int:
    order: list[int] = []  # most recent last
    hits = 0
    for step in steps.tolist():
        hits += len(set(step) & set(order))
        order = [e for e in order if e not in step]
        order = order[max(0, len(order) + len(step) - size) :] + step[::-1]
    return hits


def best_possible(steps: NDArray[np.int64], size: int, *, bypass: bool) -> int:
    """Most hits any policy can have, by trying everything."""
    plan = [frozenset(step) for step in steps.tolist()]

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(plan):
            return 0
        step = plan[at]
        free = held | step if bypass else held - step
        room = min(size if bypass else size - len(step), len(free))
        kept = frozenset() if bypass else step
        after = (best(at + 1, kept | frozenset(more)) for more in combinations(sorted(free), room))
        return len(step & held) + max(after)

    return best(0, frozenset())


@st.composite
def small_routings(draw: st.DrawFn) -> Routing:
    top_k = draw(st.integers(1, 2))
    step = st.permutations(range(5)).map(lambda order: list(order[:top_k]))
    n_layers = draw(st.integers(1, 2))
    token = st.lists(step, min_size=n_layers, max_size=n_layers)
    return routing_of(draw(st.lists(token, min_size=1, max_size=9)), 5)


@settings(max_examples=60, deadline=None)
@given(small_routings())
def test_hit_ratios_match_plain_and_exhaustive_versions(routing: Routing) -> None:
    sizes = list(range(routing.top_k, 6))
    found = hit_ratios(routing, sizes)
    uses = routing.experts.size
    for i, size in enumerate(sizes):
        layers = [routing.experts[:, layer] for layer in range(routing.n_layers)]
        lru = sum(plain_lru(steps, size) for steps in layers)
        kept = sum(best_possible(steps, size, bypass=False) for steps in layers)
        free = sum(best_possible(steps, size, bypass=True) for steps in layers)
        np.testing.assert_allclose(found.lru[i] * uses, lru)
        np.testing.assert_allclose(found.belady[i] * uses, kept)
        np.testing.assert_allclose(found.belady_bypass[i] * uses, free)


def test_shuffling_keeps_popularity_and_loses_locality() -> None:
    runs = [[[t // 20 % 5]] for t in range(1000)]
    routing = routing_of(runs, 5)
    shuffled = routing.shuffled(1)
    np.testing.assert_array_equal(popularity(routing).shares, popularity(shuffled).shares)
    assert locality(routing, (1,)).mean[0] > 0.9
    assert locality(shuffled, (1,)).mean[0] < 0.3
    np.testing.assert_array_equal(shuffled.experts, routing.shuffled(1).experts)


def test_published_figures_of_gpt_oss_20b(shared_data: Path, tmp_path: Path) -> None:
    trace = import_npz(shared_data / "gpt_oss_20b_64seq.npz", tmp_path / "t.parquet")
    routing = read_routing(trace)
    assert locality(routing, (1,)).mean[0] == pytest.approx(0.446, abs=6e-4)
    found = hit_ratios(routing, (4, 8, 16, 24))
    np.testing.assert_allclose(found.lru, [0.446, 0.662, 0.896, 0.980], atol=6e-4)
    np.testing.assert_allclose(found.belady, [0.446, 0.776, 0.949, 0.991], atol=6e-4)
    np.testing.assert_allclose(found.belady_bypass, [0.614, 0.811, 0.954, 0.992], atol=6e-4)


def test_the_summary_has_every_statistic_once() -> None:
    trace = open_trace("mixtral-like")
    table = summarize(trace, sizes=(2, 4))
    assert len({(row.name, row.parameter) for row in table}) == len(table)
    value = {(row.name, row.parameter): row.value for row in table}
    shuffled = {(row.name, row.parameter): row.shuffled for row in table}
    routing = read_routing(trace)
    assert value["locality", "lag=4"] == locality(routing).mean[2]
    assert value["recall", "ahead=2 fetched=3"] == recall(trace).mean[1, 2]
    assert value["hit_ratio_belady", "slots=4"] == hit_ratios(routing, [4]).belady[0]
    chance = shuffled["hit_ratio_lru", "slots=4"]
    assert chance is not None
    assert chance < value["hit_ratio_lru", "slots=4"] - 0.05
    assert shuffled["top1_weight", "mean"] is None


def test_the_summary_of_a_short_bare_trace(tmp_path: Path) -> None:
    bare = replace(one_layer_rows([[0, 1]]), weights=None)
    table = summarize(trace_of(tmp_path / "t", make_meta(n_layers=1), bare))
    names = {row.name for row in table}
    assert "hit_ratio_lru" in names
    assert not names & {"recall", "top1_weight"}
    assert all(np.isnan(row.value) for row in table if row.name == "locality")


def test_tokens_that_choose_fewer_experts_count_as_many_as_they_choose(tmp_path: Path) -> None:
    """One layer, top-2 of 4: tokens choose 0 1, then 1, then 1 2, then 0."""
    meta = TraceMeta(
        source="imported", model="m", n_layers=1, n_experts=4, top_k=2, variable_top_k=True
    )
    none = NO_EXPERT
    rows = Rows(
        sequence=np.zeros(4, np.uint32),
        position=np.arange(4, dtype=np.uint32),
        phase=np.ones(4, np.uint8),
        token_id=None,
        layer=np.zeros(4, np.uint16),
        experts=np.array([[0, 1], [1, none], [1, 2], [0, none]], np.uint16),
        weights=np.array([[0.5, 0.5], [1, 0], [0.75, 0.25], [1, 0]], np.float32),
    )
    with TraceWriter(tmp_path / "t.parquet", meta) as writer:
        writer.write(rows)
    trace = open_trace(tmp_path / "t.parquet")
    trace.validate()
    routing = read_routing(trace)
    # Of the four experts that have a token before: 1 repeats twice, 2 and 0 do not.
    assert locality(routing, [1]).by_layer.tolist() == [[0.5]]
    assert popularity(routing).shares.tolist() == [[2 / 6, 3 / 6, 1 / 6, 0]]
    assert gate_weights(trace).mean_top1 == (0.5 + 1 + 0.75 + 1) / 4
    # Two slots: 1 is a hit twice; 2 takes 0's slot, unless 2 may be declined.
    ratios = hit_ratios(routing, [2, 3])
    assert ratios.lru.tolist() == [2 / 6, 3 / 6]
    assert ratios.belady.tolist() == [2 / 6, 3 / 6]
    assert ratios.belady_bypass.tolist() == [3 / 6, 3 / 6]
