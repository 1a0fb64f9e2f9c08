"""A gate's rule is told from its numbers, as precisely as recorders keep them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moeroute import TraceError, TraceMeta
from moeroute.families import WEIGHT_RULES
from moeroute.weight_rules import WeightRule, detect_weight_rule, weights_by

N, E, K = 200, 16, 4


def logits(spread: float = 2.0) -> Any:
    return np.random.default_rng(3).normal(0, spread, (N, E)).astype(np.float32)


def top(values: Any) -> Any:
    return np.argsort(-values, axis=1)[:, :K].astype(np.uint16)


def bfloat16(values: Any) -> Any:
    """Rounded to bfloat16 by its bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_the_rules_worked_out_by_hand() -> None:
    row, chosen = np.log(np.array([[4.0, 2.0, 1.0, 1.0]])), np.array([[0, 1]])

    def weights(name: str, scale: float = 1.0) -> Any:
        return weights_by(WeightRule(name, scale), row, chosen)[0].tolist()

    assert weights("softmax") == [0.5, 0.25]
    assert weights("softmax-topk-renorm") == pytest.approx([2 / 3, 1 / 3])
    assert weights("topk-softmax", 3.0) == pytest.approx([2, 1])
    assert weights("sigmoid") == pytest.approx([4 / 5, 2 / 3])
    assert weights("sigmoid-renorm-scale", 2.5) == pytest.approx([2.5 * 12 / 22, 2.5 * 10 / 22])
    # Softplus of log 4 and log 2: log 5 and log 3.
    roots = [1.5 * 1.268636 / 2.316782, 1.5 * 1.048147 / 2.316782]
    assert weights("sqrtsoftplus-renorm-scale", 1.5) == pytest.approx(roots, rel=1e-5)
    with pytest.raises(ValueError, match="weight rule 'softmax-topk': there are softmax-topk-"):
        weights("softmax-topk")


@pytest.mark.parametrize("name", WEIGHT_RULES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_a_rule_is_told_from_float16_logits_and_bfloat16_weights(
    name: str, scale: float, spread: float
) -> None:
    exact = logits(spread)
    experts = top(exact)
    weights = bfloat16(weights_by(WeightRule(name, scale), exact, experts))
    found = detect_weight_rule(exact.astype(np.float16), weights, experts)
    same = "softmax-topk-renorm" if name == "topk-softmax" else name
    assert found is not None
    assert found.name == same
    assert found.scale == pytest.approx(scale, rel=0.01)


def test_experts_need_not_be_those_of_the_largest_logits() -> None:
    values = logits()
    experts = top(values + np.random.default_rng(4).normal(0, 1, (N, E)))  # a bias for the choice
    weights = weights_by(WeightRule("sigmoid-renorm-scale", 2.5), values, experts)
    assert detect_weight_rule(values, weights, experts) == WeightRule("sigmoid-renorm-scale", 2.5)


def test_where_no_rule_reproduces_every_row_there_is_none() -> None:
    values = logits()
    experts = top(values)
    weights = weights_by(WeightRule("softmax"), values, experts)
    assert detect_weight_rule(values, weights**1.1, experts) is None
    one_off = weights.copy()
    one_off[7, 2] *= 1.1
    assert detect_weight_rule(values, one_off, experts) is None
    not_a_number = np.where(np.arange(N)[:, None] == 7, np.nan, one_off)
    assert detect_weight_rule(values, not_a_number, experts) == WeightRule("softmax")
    assert detect_weight_rule(values[:0], weights[:0], experts[:0]) is None


def test_metadata_has_rules_that_exist_and_old_metadata_none() -> None:
    meta = TraceMeta(
        source="recorded",
        model="m",
        n_layers=1,
        n_experts=4,
        top_k=2,
        weight_rule="sigmoid-renorm-scale",
        weight_scale=2.5,
    )
    assert TraceMeta.from_json(meta.to_json()) == meta
    old = meta.to_json().replace('"weight_rule":"sigmoid-renorm-scale","weight_scale":2.5,', "")
    assert TraceMeta.from_json(old).weight_rule is None
    with pytest.raises(TraceError, match="weight_rule is 'soft', not one of softmax-topk-renorm"):
        TraceMeta.from_json(meta.to_json().replace("sigmoid-renorm-scale", "soft"))
