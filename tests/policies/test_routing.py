"""Routing by a policy: which experts a token gets, their weights, and the account of the change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moepolicy import (
    WEIGHT_RULES,
    Context,
    ExpertCache,
    Policy,
    PolicyError,
    RoutingRule,
    Step,
    TokenRows,
    counts_of,
    demand_order,
    find_policy,
    pool_logits,
)
from moeroute.families import WEIGHT_RULES as NAMED
from moeroute.weight_rules import WeightRule as Named
from moeroute.weight_rules import weights_by

CONTEXT = Context(n_layers=2, n_experts=4, top_k=2, slots=3)
LOGITS = [math.log(8), math.log(4), math.log(2), math.log(2)]  # softmax: 1/2, 1/4, 1/8, 1/8


class Choosing(Policy):
    """Gives the token of each row the experts it was made with, and notes what it was shown."""

    lossy = True

    def __init__(self, context: Context, choices: dict[int, list[int]]) -> None:
        self.choices = choices
        self.shown: list[tuple[int, list[bool], list[int], list[float]]] = []

    def route(self, step: Step, row: int, resident: Any, chosen: Any) -> None:
        self.shown.append((row, resident.tolist(), step.experts.tolist(), step.logits.tolist()))
        chosen[:] = self.choices.get(row, chosen)

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


def rows_of(ids: Any, weights: Any, logits: Any) -> TokenRows:
    return TokenRows(
        np.array(ids, np.int32), np.array(weights, np.float32), np.array(logits, np.float32)
    )


def step_of(rows: TokenRows, number: int = 0, layer: int = 0) -> Step:
    experts, weights = demand_order(rows.ids, rows.weights)
    keys = experts + layer * CONTEXT.n_experts
    pooled = pool_logits(rows.logits)
    return Step(number, layer, keys, weights, pooled, np.empty((0, 0), np.float32), len(rows.ids))


def routed(
    choices: dict[int, list[int]], rows: TokenRows, rule: RoutingRule, layer: int = 0
) -> Any:
    policy = Choosing(CONTEXT, choices)
    cache = ExpertCache(CONTEXT, policy, weight_rule=rule)
    cache.begin(step_of(rows, layer=layer), rows)
    return cache, policy


@pytest.mark.parametrize(
    ("rule", "scale", "expected"),
    [
        # Experts 3 and 1 in place of 0 and 1; exponentials 2 and 4 of 16.
        ("softmax", 1.0, [2 / 16, 4 / 16]),
        ("softmax-topk-renorm", 1.0, [2 / 6, 4 / 6]),
        ("topk-softmax", 1.0, [2 / 6, 4 / 6]),
        # Sigmoids of log 2 and log 4: 2/3 and 4/5.
        ("sigmoid", 1.0, [2 / 3, 4 / 5]),
        ("sigmoid-renorm-scale", 2.5, [2.5 * 10 / 22, 2.5 * 12 / 22]),
        # Their softplus is log 3 and log 5, of which the square roots sum to 2.3168.
        ("sqrtsoftplus-renorm-scale", 1.5, [1.5 * 1.048147 / 2.316782, 1.5 * 1.268636 / 2.316782]),
    ],
)
def test_new_weights_come_of_the_original_logits_by_the_model_s_rule(
    rule: str, scale: float, expected: list[float]
) -> None:
    rows = rows_of([[0, 1]], [[0.6, 0.4]], [LOGITS])
    cache, policy = routed({0: [3, 1]}, rows, RoutingRule(rule, scale), layer=1)
    assert rows.ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(rows.weights[0], expected, rtol=1e-6)
    step, used_by = cache.routed()
    assert step.experts.tolist() == [4 + 1, 4 + 3]  # the heavier first
    np.testing.assert_array_equal(step.weights, rows.weights[0, ::-1])
    assert used_by.tolist() == [1, 1]
    assert policy.shown == [(0, [False] * 4, [4, 5], pytest.approx(LOGITS))]
    counts = counts_of(cache.arrays)
    assert (counts.rerouted, counts.requests, counts.misses) == (1, 2, 2)
    assert counts.gate_mass == pytest.approx(1.0)
    assert counts.rerouted_share == pytest.approx(0.6)


def test_a_row_that_keeps_its_experts_keeps_its_weights_to_the_bit() -> None:
    # 0.6 and 0.4 are not what any rule makes of these logits; an order is no choice.
    rows = rows_of([[0, 1], [0, 1], [2, 3]], [[0.6, 0.4]] * 3, [LOGITS] * 3)
    cache, _ = routed({0: [1, 0], 2: [0, 3]}, rows, RoutingRule("topk-softmax"))
    kept = np.array([0.6, 0.4], np.float32)
    np.testing.assert_array_equal(rows.weights[:2], [kept, kept])
    assert rows.ids.tolist() == [[0, 1], [0, 1], [0, 3]]
    np.testing.assert_allclose(rows.weights[2], [0.8, 0.2], rtol=1e-6)
    step, used_by = cache.routed()
    # Sums: 0.6 + 0.6 + 0.8, 0.4 + 0.4, 0.2.
    assert step.experts.tolist() == [0, 1, 3]
    np.testing.assert_allclose(step.weights, [2.0, 0.8, 0.2], rtol=1e-6)
    assert used_by.tolist() == [3, 2, 1]
    assert counts_of(cache.arrays).rerouted_share == pytest.approx(0.6 / 3)


def test_a_row_that_chose_fewer_experts_keeps_their_number() -> None:
    none = 0xFFFF  # as a trace fills the row up
    rows = rows_of([[1, none], [0, 2]], [[1.0, 0.0], [0.6, 0.4]], [LOGITS] * 2)
    cache, policy = routed({0: [3]}, rows, RoutingRule("topk-softmax"))
    assert rows.ids.tolist() == [[3, none], [0, 2]]
    assert rows.weights[0].tolist() == [1.0, 0.0]
    assert [shown[2] for shown in policy.shown] == [[1], [0, 2]]
    step, used_by = cache.routed()
    assert step.experts.tolist() == [3, 0, 2]
    assert used_by.tolist() == [1, 1, 1]


def test_residents_are_what_is_there_or_under_way_of_the_layer() -> None:
    policy = Choosing(CONTEXT, {})
    cache = ExpertCache(CONTEXT, policy, weight_rule=RoutingRule("softmax"))
    rows = rows_of([[2, 0]], [[0.5, 0.3]], [LOGITS])
    cache.begin(step_of(rows, layer=1), rows)
    while (copy := cache.start()) is not None:
        cache.finish(copy.key)
    for key in (4 + 2, 4 + 0):
        cache.consume(key)
    cache.end()
    for layer, expected in ((0, [False] * 4), (1, [True, False, True, False])):
        cache.begin(step_of(rows, 1, layer), rows)
        while (copy := cache.start()) is not None:
            cache.finish(copy.key)
        cache.end()
        assert policy.shown[-1][1] == expected


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ([0, 4], "route chose an expert that does not exist"),
        ([-1, 2], "route chose an expert that does not exist"),
        ([3, 3], "route chose an expert twice for one token"),
    ],
)
def test_a_choice_that_there_cannot_be_is_named_with_its_step(choice: list[int], said: str) -> None:
    rows = rows_of([[0, 1]], [[0.6, 0.4]], [LOGITS])
    with pytest.raises(PolicyError, match=rf"(?s)step 0.*{said}|{said}.*step 0"):
        routed({0: choice}, rows, RoutingRule("softmax"))


def test_an_expert_without_a_finite_weight_is_refused() -> None:
    rows = rows_of([[0, 1]], [[0.6, 0.4]], [[0.0, 1.0, 2.0, math.nan]])
    with pytest.raises(PolicyError, match="gate weight is not finite"):
        routed({0: [0, 3]}, rows, RoutingRule("topk-softmax"))


def test_what_routing_needs_is_said_where_it_lacks() -> None:
    rows = rows_of([[0, 1]], [[0.6, 0.4]], [LOGITS])
    cache = ExpertCache(CONTEXT, Choosing(CONTEXT, {}), name="mine")
    with pytest.raises(PolicyError, match=r"'mine' .* how the model's gates make weights"):
        cache.begin(step_of(rows), rows)
    cache.set_weight_rule(RoutingRule("softmax"))
    with pytest.raises(PolicyError, match="'mine' routes, and is given no rows"):
        cache.begin(step_of(rows))
    with pytest.raises(PolicyError, match="gate weights by 'sparsemixer' cannot be computed"):
        cache.set_weight_rule(RoutingRule("sparsemixer"))


def test_a_policy_that_routes_must_say_that_it_is_lossy(tmp_path: Any) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from moepolicy.library.recency.lru import Lru\n"
        "class Mine(Lru):\n"
        "    def route(self, step, row, resident, chosen):\n"
        "        pass\n"
    )
    with pytest.raises(PolicyError, match=r"has route, .*: declare lossy = True"):
        find_policy(f"{mine}:Mine")
    mine.write_text(mine.read_text() + "    lossy = True\n")
    assert find_policy(f"{mine}:Mine").requires == {"logits", "weights"}


def test_the_rules_are_those_that_a_trace_may_name() -> None:
    assert set(WEIGHT_RULES) == set(NAMED)


@given(
    st.sampled_from(NAMED),
    st.sampled_from([1.0, 2.5]),
    st.lists(st.floats(-6, 6, width=16), min_size=5, max_size=5),
    st.permutations(range(5)),
)
def test_weights_are_those_that_a_trace_is_checked_by(
    name: str, scale: float, logits: list[float], order: list[int]
) -> None:
    context = CONTEXT._replace(n_experts=5)
    rows = rows_of([order[:2]], [[0.5, 0.5]], [logits])
    cache = ExpertCache(
        context, Choosing(context, {0: order[2:4]}), weight_rule=RoutingRule(name, scale)
    )
    cache.begin(step_of(rows), rows)
    expected = weights_by(Named(name, scale), np.array([logits]), np.array([order[2:4]]))
    np.testing.assert_allclose(rows.weights, expected, rtol=1e-5)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.permutations(range(4)), min_size=n, max_size=n),
            st.lists(
                st.lists(st.sampled_from([0.1, 0.2, 0.4]), min_size=2, max_size=2),
                min_size=n,
                max_size=n,
            ),
        )
    )
)
def test_a_policy_that_changes_nothing_leaves_the_step_as_it_was(case: Any) -> None:
    ids, weights = case
    rows = rows_of([order[:2] for order in ids], weights, [LOGITS] * len(ids))
    before = step_of(rows)
    cache, _ = routed({}, rows, RoutingRule("softmax"))
    after, used_by = cache.routed()
    np.testing.assert_array_equal(after.experts, before.experts)
    np.testing.assert_array_equal(after.weights, before.weights)
    assert used_by.sum() == 2 * len(ids)
    assert counts_of(cache.arrays).rerouted == 0
