"""The built-in policies that have more than one answer to a miss, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moepolicy import Context, ExpertCache, Kind, PolicyError, Step, find_policy
from moepolicy.state import LOW_MASS, SKIPPED_MASS


class Driven:
    """Two layers of 4 experts under a policy, a step at a time, every copy at once."""

    def __init__(self, policy: str, *, slots: int = 4) -> None:
        context = Context(n_layers=2, n_experts=4, top_k=2, slots=slots)
        self.cache = ExpertCache(context, find_policy(policy).build(context))
        self.number = 0

    def step(
        self,
        weights: dict[int, float],
        *,
        layer: int = 0,
        tokens: int = 1,
        logits: tuple[float, ...] = (0, 0, 0, 0),
    ) -> list[str]:
        """Serve the experts with their weights, heaviest first; the outcomes by name."""
        keys = np.array(list(weights), np.int32) + np.int32(4 * layer)
        given = np.array(list(weights.values()), np.float32)
        step = Step(
            self.number,
            layer,
            keys,
            given,
            np.array(logits, np.float32),
            np.empty((0, 0), np.float32),
            tokens,
        )
        self.number += 1
        outcome = [Kind(kind).name for kind in self.cache.begin(step).tolist()]
        self.substitute = self.cache.substitute(len(keys) - 1)
        while copy := self.cache.start():
            self.cache.finish(copy.key)
        for key in keys.tolist():
            self.cache.consume(key)
        self.cache.end()
        self.cache.check()
        return outcome

    def mass(self, entry: int) -> float:
        return round(float(self.cache.arrays.mass[entry]), 6)


@pytest.mark.parametrize(
    ("first", "second", "low", "skipped"),
    [
        (0.5, "MISS", 0.0, 0.0),  # up to 0.6 before it: in full
        (0.7, "MISS", 0.3, 0.0),  # up to 0.9: at the lower precision
        (0.95, "SKIP", 0.0, 0.05),
    ],
)
def test_hobbit_answers_by_the_weight_before_an_expert(
    first: float, second: str, low: float, skipped: float
) -> None:
    run = Driven("hobbit")
    # Weights need not add up to 1: the rule is of their shares.
    assert run.step({2: 2 * first, 1: 2 * (1 - first)}) == ["MISS", second]
    assert run.cache.is_low(1) == (low > 0)
    assert run.mass(LOW_MASS) / 2 == pytest.approx(low)
    assert run.mass(SKIPPED_MASS) / 2 == pytest.approx(skipped)


def test_hobbit_fetches_again_what_it_has_at_the_lower_precision_and_wants_in_full() -> None:
    run = Driven("hobbit")
    run.step({2: 0.7, 1: 0.3})
    assert run.step({2: 0.95, 1: 0.05}) == ["HIT", "HIT"]  # a low copy is better than none
    assert run.step({1: 0.8, 2: 0.2}) == ["MISS", "HIT"]
    assert not run.cache.is_low(1)
    assert run.cache.count(Kind.LOAD) == 3


def test_hobbit_loads_a_prompt_in_full() -> None:
    run = Driven("hobbit")
    assert run.step({0: 8.0, 1: 0.5, 2: 0.01}, tokens=5) == ["MISS", "MISS", "MISS"]
    assert run.cache.count(Kind.LOW) == 0


def test_hobbit_evicts_what_was_used_least_at_full_precision() -> None:
    run = Driven("hobbit:recency=0,frequency=0,high_frequency=1,nearness=0", slots=2)
    run.step({0: 0.9, 1: 0.1})  # 0 in full, 1 at the lower precision
    run.step({1: 0.9, 0: 0.1})  # and the other way round, both there
    run.step({0: 1.0})
    run.step({3: 1.0})
    assert [key for key in range(4) if run.cache.slot_of(key) >= 0] == [0, 3]


def test_hobbit_s_score_is_the_weighted_sum_of_its_four_shares() -> None:
    """Three passes over two layers of 4. Key 0 was used in passes 1 and 3, in full both times; key
    1 in pass 1, in full no more than once; key 5 of layer 1 in pass 2, at the lower precision."""
    context = Context(n_layers=2, n_experts=4, top_k=2, slots=2)
    policy: Any = find_policy(
        "hobbit:recency=0.1,frequency=0.2,high_frequency=0.3,nearness=0.4"
    ).build(context)
    nothing = np.empty(0, np.float32)
    passes = [
        (0, [0, 1], [0.5, 0.5]),
        (1, [4], [1.0]),
        (0, [2], [1.0]),
        (1, [6, 5], [0.8, 0.2]),
        (0, [0], [1.0]),
    ]
    for number, (layer, keys, weights) in enumerate(passes):
        shares = np.array(weights, np.float32)
        policy.on_step(
            Step(
                number,
                layer,
                np.array(keys, np.int32),
                shares,
                nothing,
                np.empty((0, 0), np.float32),
                1,
            )
        )
    # Of 3 passes: last used in, times used, times in full; and 0 or 1 of 2 layers away.
    assert policy.score(0, 0) == pytest.approx(0.1 * 3 / 3 + 0.2 * 2 / 3 + 0.3 * 2 / 3 + 0.4)
    assert policy.score(0, 1) == pytest.approx(0.1 * 1 / 3 + 0.2 * 1 / 3 + 0.3 * 1 / 3 + 0.4)
    assert policy.score(0, 5) == pytest.approx(0.1 * 2 / 3 + 0.2 * 1 / 3 + 0.3 * 0 + 0.4 * 0.5)
    assert policy.score(1, 5) == pytest.approx(0.1 * 2 / 3 + 0.2 * 1 / 3 + 0.3 * 0 + 0.4)
    assert policy.score(1, 0) == pytest.approx(0.1 * 3 / 3 + 0.2 * 2 / 3 + 0.3 * 2 / 3 + 0.4 * 0.5)


def test_adapmoe_leaves_out_a_light_second_expert_that_is_missing() -> None:
    run = Driven("adapmoe-skip")  # below sqrt(0.005 / 0.125) = 0.2
    assert run.step({0: 0.79, 1: 0.21}) == ["MISS", "MISS"]
    assert run.step({0: 0.81, 2: 0.19}) == ["HIT", "SKIP"]
    assert run.step({0: 0.81, 1: 0.19}) == ["HIT", "HIT"]  # it is there
    assert run.step({3: 9.0, 2: 0.1}, tokens=6) == ["MISS", "MISS"]
    lenient = Driven("adapmoe-skip:sensitivity=0.03125")  # below 0.4
    assert lenient.step({0: 0.61, 1: 0.39}) == ["MISS", "SKIP"]


@pytest.mark.parametrize("layer", [0, 1])
def test_emoe_takes_the_best_resident_that_was_not_chosen(layer: int) -> None:
    run = Driven("emoe-substitute", slots=3)
    for expert in (0, 1, 3):  # until the layer holds its three
        assert run.step({expert: 1.0}, layer=layer) == ["MISS"]
    wanted = {1: 0.6, 2: 0.4}
    for logits, substitute in (((0.1, 5.0, 3.0, 0.7), 3), ((0.9, 5.0, 3.0, 0.7), 0)):
        assert run.step(wanted, layer=layer, logits=logits) == ["HIT", "SUBSTITUTE"]
        assert run.substitute == 4 * layer + substitute
    # A prompt brings its own.
    assert run.step({2: 4.0, 1: 3.0}, layer=layer, tokens=7) == ["MISS", "HIT"]


def test_emoe_loads_where_every_resident_is_chosen() -> None:
    run = Driven("emoe-substitute", slots=1)
    assert run.step({0: 1.0}) == ["MISS"]
    assert run.step({0: 0.6, 1: 0.4}) == ["HIT", "MISS"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hobbit:high=0.95", "high must be from 0 to low"),
        ("adapmoe-skip:sensitivity=0", "sensitivity must be above 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Driven(spec)


def test_they_are_marked_lossy() -> None:
    marked: Any = {
        name: find_policy(name).policy.lossy
        for name in ("hobbit", "adapmoe-skip", "emoe-substitute", "fiddler")
    }
    assert marked == {
        "hobbit": True,
        "adapmoe-skip": True,
        "emoe-substitute": True,
        "fiddler": False,
    }
