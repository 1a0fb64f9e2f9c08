"""How a batch of tokens becomes one step."""

from __future__ import annotations

import numpy as np
from moepolicy import demand_order, next_use, pool_logits
from moepolicy.policy import NO_USE


def test_one_token_keeps_the_routers_order_among_equals() -> None:
    experts, weights = demand_order(np.array([[5, 2, 7]]), np.array([[0.25, 0.5, 0.25]]))
    assert experts.tolist() == [2, 5, 7]
    assert weights.tolist() == [0.5, 0.25, 0.25]


def test_a_batch_is_the_union_by_summed_weight() -> None:
    ids = np.array([[3, 1], [1, 0], [2, 3]])
    weights = np.array([[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]])
    experts, mass = demand_order(ids, weights)
    assert experts.tolist() == [1, 2, 3, 0]  # 2 and 3 weigh the same: the lower first
    assert mass.tolist() == [1.25, 0.75, 0.75, 0.25]


def test_pooled_logits_are_the_log_of_the_mean_probability() -> None:
    one = np.array([[1.0, -2.0, 0.5]], np.float16)
    assert pool_logits(one).tolist() == [1.0, -2.0, 0.5]
    two = np.array([[5.0, 5.0, -60.0], [5.0, -60.0, 5.0]], np.float16)
    np.testing.assert_allclose(np.exp(pool_logits(two)), [0.5, 0.25, 0.25], rtol=1e-6)
    assert np.isnan(pool_logits(np.array([[1.0, 2.0], [np.nan, np.nan]]))).all()


def test_next_use_names_the_step() -> None:
    keys = np.array([0, 1, 0, 2, 1], np.int32)  # steps {0, 1}, {0}, {2, 1}
    found = next_use(keys, np.array([0, 2, 3, 5]))
    assert found.tolist() == [1, 2, NO_USE, NO_USE, NO_USE]
