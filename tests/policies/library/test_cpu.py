"""Misses shared between link and CPU, on traces worked out by hand."""

from __future__ import annotations

import math

import pytest
from moepolicy import Context, PolicyError, find_policy
from support.step_by_step import StepByStep


def logits(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_hybrimoe_evicts_the_least_score() -> None:
    """alpha = 1/2, one expert a token: the two likeliest count. S of 0 after three tokens of 0.6 is
    0.3, 0.45, 0.525; then 0.2625 as 3 comes (S 0.3). As 2 comes it is 0.131 + 0.1, that of 3 0.15:
    3 goes, although used later."""
    run = StepByStep("hybrimoe", Context(1, 4, 1, slots=2))
    for _ in range(3):
        run.step([0], logits=logits(0.6, 0.2, 0.1, 0.1))
    assert run.policy.score[0] == pytest.approx(0.525)
    run.step([3], logits=logits(0.1, 0.1, 0.2, 0.6))
    run.step([2], logits=logits(0.2, 0.1, 0.6, 0.1))
    assert run.policy.score[:4] == pytest.approx([0.23125, 0.04375, 0.35, 0.15])
    assert (run.loaded, run.evicted) == ([2], [3])


def test_hybrimoe_fetches_the_next_layer_s_greatest_score() -> None:
    """Layer 1: S of 0 is 0.3, then 0.15 + 0.15; of 1 it is 0.1, then 0.05 + 0.2. One slot has 1."""
    run = StepByStep("hybrimoe", Context(2, 4, 1, slots=1))
    run.step([0], 1, logits=logits(0.6, 0.2, 0.1, 0.1))
    run.step([1], 1, logits=logits(0.3, 0.4, 0.2, 0.1))
    run.step([0], 0, logits=logits(0.6, 0.2, 0.1, 0.1))
    assert (run.guessed, run.evicted) == ([4], [5])


@pytest.mark.parametrize(
    ("over", "experts", "tokens", "outcome"),
    [
        (1.0, 2, 1, "LC"),  # 1 <= 1: a copy; then 2 > 1
        (3.0, 2, 1, "LL"),  # 2 <= 3
        (0.4, 2, 1, "CC"),  # 1 > 0.4, 1 > 0.8
        (0.5, 4, 1, "LCCC"),  # C 0.5, L 1 <= 1, C 1.0, C 1.5
        (0.5, 4, 8, "LLLC"),  # four tokens an expert: C takes 2. L 1, L 2, C 2, L 3 <= 4
    ],
)
def test_hybrimoe_takes_misses_from_two_ends(
    over: float, experts: int, tokens: int, outcome: str
) -> None:
    run = StepByStep(f"hybrimoe:cpu_over_copy={over}", Context(1, 4, 2, slots=4))
    found = run.step(list(range(experts)), tokens=tokens)
    assert "".join({"MISS": "L", "COMPUTE": "C"}[one] for one in found) == outcome


def test_hybrimoe_shares_only_what_is_missing() -> None:
    """Of 2, 0 and 1 the first is there: as if there were two misses."""
    run = StepByStep("hybrimoe", Context(1, 4, 2, slots=4))
    run.step([2])
    assert run.step([2, 0, 1]) == ["HIT", "MISS", "COMPUTE"]
    assert run.step([1, 0, 2]) == ["MISS", "HIT", "HIT"]  # a single miss is a copy: 1 <= 1


def test_split_loads_every_second_miss_at_a_half() -> None:
    run = StepByStep("split", Context(1, 6, 2, slots=6))
    assert run.step([0, 1]) == ["MISS", "COMPUTE"]
    assert run.step([2]) == ["COMPUTE"]  # a half is carried on
    assert run.step([0, 3]) == ["HIT", "MISS"]
    assert run.step([4, 5, 1]) == ["MISS", "COMPUTE", "COMPUTE"]  # 3 / 2: one, a half is left
    assert run.step([4, 5]) == ["HIT", "MISS"]


@pytest.mark.parametrize(("share", "outcome"), [(0, "COMPUTE"), (1, "MISS")])
def test_split_may_leave_all_to_one(share: int, outcome: str) -> None:
    run = StepByStep(f"split:share={share}", Context(1, 6, 2, slots=6))
    assert run.step([0, 1, 2]) == [outcome] * 3


def test_split_evicts_the_least_recent() -> None:
    run = StepByStep("split:share=1", Context(1, 6, 1, slots=2))
    for expert in (0, 1, 0, 2):
        run.step([expert])
    assert run.evicted == [1]


def test_insert_cap_counts_a_pass_s_loads() -> None:
    run = StepByStep("insert-cap:cap=1", Context(2, 4, 2, slots=4))
    assert run.step([0, 1], 0) == ["MISS", "COMPUTE"]
    assert run.step([0], 1) == ["COMPUTE"]
    assert run.step([0, 2], 0) == ["HIT", "MISS"]  # the next pass has its own
    assert run.step([0], 1) == ["COMPUTE"]


def test_insert_cap_evicts_the_least_recent() -> None:
    run = StepByStep("insert-cap", Context(1, 6, 1, slots=2))
    for expert in (0, 1, 0, 2):
        run.step([expert])
    assert run.evicted == [1]


def test_pay_back_loads_what_repays_its_copy() -> None:
    """A rate halves in a pass, and a use adds 1/2. A copy repays itself at a gain of 1/2: as 1
    comes, its 0.5 gain 0.25 on 0; as it comes again, its 0.75 gain 0.625."""
    run = StepByStep("pay-back:uses=1,passes=2,half_life=1", Context(1, 4, 1, slots=1))
    assert run.step([0]) == ["MISS"]  # a free slot
    assert run.step([1]) == ["COMPUTE"]
    assert run.policy.rate[:2] == pytest.approx([0.25, 0.5])
    assert run.step([1]) == ["MISS"]
    assert run.evicted == [0]


def test_pay_back_promises_a_free_slot_once() -> None:
    run = StepByStep("pay-back:uses=1,passes=2,half_life=1", Context(1, 4, 2, slots=2))
    assert run.step([0]) == ["MISS"]
    assert run.step([1, 2]) == ["MISS", "COMPUTE"]  # 0.5 gains 0.25 on 0
    assert run.held == [0, 1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hybrimoe:alpha=0.0", "alpha must be above 0, up to 1, not 0"),
        ("hybrimoe:n=9", "n must be 0 to 4, not 9"),
        ("hybrimoe:cpu_over_copy=0.0", "cpu_over_copy must be above 0, not 0"),
        ("split:share=1.5", "split: share must be from 0 to 1, not 1.5"),
        ("insert-cap:cap=-1", "insert-cap: cap must be 0 or more, not -1"),
        ("pay-back:passes=0", "passes and half_life 1 or more, not 1.0, 0 and 32"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(1, 4, 1, 3))
