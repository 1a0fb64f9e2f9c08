"""Policies that give tokens other experts than the gate chose, on traces worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from moepolicy import Context, PolicyError, find_policy
from moepolicy.library.routing.adapmoe import expected_loads
from support.step_by_step import StepByStep


def logits(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_adapmoe_fetches_the_first_missing_of_the_next_gate_s_choice() -> None:
    """Layer 1 has its likeliest, 1; the second, 2 (key 6), is missing. A prompt fetches none."""
    run = StepByStep("adapmoe", Context(2, 4, 2, slots=2))
    run.step([1, 3], 1)
    likely = [[0.1, 0.9, 0.5, 0.0]]
    run.step([0, 1], 0, tokens=2, chosen=[[0, 1], [1, 0]], predicted=likely)
    assert run.guessed == []
    run.step([0, 1], 0, predicted=likely)
    assert run.guessed == [6]


def test_adapmoe_leaves_a_light_second_expert_out() -> None:
    run = StepByStep("adapmoe", Context(1, 4, 2, slots=4))
    assert run.step([2, 1], weights=[0.81, 0.19]) == ["MISS", "SKIP"]  # sqrt(0.005 / 0.125) = 0.2
    assert run.step([3, 1], weights=[0.79, 0.21]) == ["MISS", "MISS"]


def test_adapmoe_shares_slots_by_expected_loads() -> None:
    """Two layers of 3 experts, one a token, so that k slots miss with 1 - k / 3, and the gate of
    layer 1 is right with 0.566: its loads are 0.434 of that. Layer 0 gains more by every slot."""
    context = Context(2, 3, 1, slots=2)
    assert find_policy("adapmoe").shares(context) == (3, 1)


def test_adapmoe_expects_the_loads_that_its_authors_do() -> None:
    """Two of 4 experts a token, 2 slots. Both are missing with 1/6, one with 4/6: loads without
    prediction 1/6 x 2 + 4/6 = 1; if it is right, one less in 5 of 6 cases."""
    loads = expected_loads(4, 2, 0.5)
    assert loads == pytest.approx([2 - 0.5, 1.5 - 0.5, 1 - 5 / 12, 0.5 - 0.5 / 2, 0])


def test_pre_gated_commits_what_was_predicted() -> None:
    """Layer 0's prediction, 2, is fetched and is layer 1's routing, whose gate says 1."""
    run = StepByStep("pre-gated", Context(2, 4, 1, slots=2))
    run.step([0], 0, predicted=[[0.0, 0.1, 0.9, 0.2]])
    assert (run.demanded, run.guessed) == ([0], [6])
    assert run.step([1], 1, logits=logits(0.1, 0.7, 0.1, 0.1)) == ["HIT"]
    assert run.demanded == [6]
    run.step([1], 1)  # another pass, and nothing predicted
    assert run.demanded == [5]


def test_pre_gated_commits_nothing_for_a_batch() -> None:
    run = StepByStep("pre-gated", Context(2, 4, 1, slots=2))
    run.step([0, 1], 0, tokens=2, chosen=[[0], [1]], predicted=[[0.0, 0.1, 0.9, 0.2]])
    run.step([0, 1], 1, tokens=2, chosen=[[0], [1]])
    assert sorted(run.demanded) == [4, 5]


@pytest.mark.parametrize(("strength", "demanded"), [(0.2, [0, 2]), (0.02, [0, 1])])
def test_cache_conditional_leans_towards_residents(strength: float, demanded: list[int]) -> None:
    """2 and 3 are there. The ranges of both tokens' logits are 4: 2 has 2.9 + 0.8 or + 0.08, 1 has
    3. 0 is the best, and is as good as resident."""
    run = StepByStep(f"cache-conditional:strength={strength}", Context(1, 4, 2, slots=4))
    run.step([2, 3], logits=[0.0, 0.0, 4.0, 3.9])
    run.step([0, 1], logits=[4.0, 3.0, 2.9, 0.0])
    assert run.policy.spread[0] == pytest.approx(4.0)
    assert run.demanded == demanded


def test_cache_conditional_loads_the_sure_ones_only() -> None:
    """Neither 0 nor 1 is there, bonus 1.6: 2 with 2.0 + 1.6 beats 0 unless 0 is sure."""
    for sure, demanded in ((0, [2]), (1, [0])):
        run = StepByStep(f"cache-conditional:strength=0.4,sure={sure}", Context(1, 4, 1, slots=4))
        run.step([2], logits=[0.0, 0.0, 4.0, 3.9])
        run.step([0], logits=[3.5, 3.0, 2.0, -0.5])
        assert run.demanded == demanded


def test_cache_conditional_follows_the_range() -> None:
    run = StepByStep("cache-conditional:rate=0.5", Context(1, 4, 1, slots=4))
    run.step([0], logits=[4.0, 0.0, 0.0, 0.0])
    run.step([0], logits=[2.0, 0.0, 0.0, 0.0])
    assert run.policy.spread[0] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("rule", "gate", "demanded"),
    [
        ("alpha=0.1", (0.45, 0.4, 0.1, 0.05), 1),  # 0.4 + 0.1 > 0.45
        ("alpha=0.04", (0.45, 0.4, 0.1, 0.05), 0),
        ("beta=1.0", (math.e**2, math.e**1.5, 1, 1), 1),  # 2 - 1 < 1.5: 0 was never used
        ("beta=0.4", (math.e**2, math.e**1.5, 1, 1), 0),
    ],
)
def test_moe_eras_favours_residents(rule: str, gate: tuple[float, ...], demanded: int) -> None:
    run = StepByStep(f"moe-eras:{rule}", Context(1, 4, 1, slots=4))
    run.step([1], logits=logits(0.1, 0.7, 0.1, 0.1))
    run.step([0], logits=logits(*gate))
    assert run.demanded == [demanded]


def test_moe_eras_prices_the_seldom_ones() -> None:
    """One slot. 0 was used twice, 1 thrice: 0, missing, costs 0.9 x (1 - 2/3): 1.7 - 0.3 < 1.5.
    With 1 used again it is 0.9 x (1 - 2/4): 2 - 0.45 > 1.5."""
    run = StepByStep("moe-eras:beta=0.9", Context(1, 4, 1, slots=1))
    for expert in (0, 0, 1, 1, 1):
        run.step([expert], logits=[9.0 * (e == expert) for e in range(4)])
    for logit, demanded in ((1.7, 1), (2.0, 0)):
        run.step([0], logits=[logit, 1.5, 0.0, 0.0])
        assert run.demanded == [demanded]


def test_prompts_keep_their_gates_choice_under_a_leaning_gate() -> None:
    for spec in ("cache-conditional:strength=9", "moe-eras:alpha=9"):
        run = StepByStep(spec, Context(1, 4, 1, slots=2))
        run.step([3])
        run.step([0, 1], tokens=2, chosen=[[0], [1]])
        assert sorted(run.demanded) == [0, 1]


def test_emoe_makes_do_with_what_is_there_once_the_slots_are_full() -> None:
    run = StepByStep("emoe", Context(1, 4, 1, slots=2))
    for expert in (0, 1):
        assert run.step([expert], logits=[float(e == expert) for e in range(4)]) == ["MISS"]
    assert run.step([2], logits=[1.0, 2.0, 3.0, 0.0]) == ["HIT"]
    assert run.demanded == [1]
    run.step([2, 3], tokens=2, chosen=[[2], [3]])  # a prompt loads, oldest out first
    assert (run.loaded, run.evicted) == ([2, 3], [0, 1])


def test_emoe_brings_in_what_the_gates_chose_most() -> None:
    """In the first sequence 2 was chosen most, though 1 stood in; 1 comes to two as the second
    begins. 1 and 2 are wanted: 2 comes for 0."""
    run = StepByStep("emoe:period=1", Context(1, 4, 1, slots=2))
    for number, expert in enumerate((0, 1, 2, 2, 2)):
        run.step([expert], logits=[1.0, 2.0, 0.0, 0.0], begins_sequence=number == 0)
    assert run.held == [0, 1]
    run.step([1], logits=[1.0, 2.0, 0.0, 0.0], begins_sequence=True)
    assert (run.guessed, run.evicted) == ([2], [0])


def test_swapmoe_exchanges_what_has_become_important() -> None:
    """One slot a layer. Layer 1: importance 0.4 + 0.1 of 0, and 0.2 + 0.7 of 2, which 0 stood in
    for. As the third pass begins, 2 (key 6) comes a layer ahead."""
    run = StepByStep("swapmoe:period=3", Context(2, 4, 1, slots=1))
    run.step([0], 0, logits=logits(0.7, 0.1, 0.1, 0.1))
    run.step([0], 1, logits=logits(0.4, 0.2, 0.2, 0.2))
    run.step([0], 0, logits=logits(0.7, 0.1, 0.1, 0.1))
    assert run.step([2], 1, logits=logits(0.1, 0.1, 0.7, 0.1)) == ["HIT"]
    assert run.demanded == [4]
    assert run.guessed == []
    assert run.policy.importance[4:] == pytest.approx([0.5, 0.3, 0.9, 0.3])
    run.step([0], 0, logits=logits(0.7, 0.1, 0.1, 0.1))
    assert (run.guessed, run.evicted) == ([6], [4])
    assert run.policy.importance[4:] == pytest.approx([0.25, 0.15, 0.45, 0.15])


def test_swapmoe_routes_prompts_within_the_set_too() -> None:
    run = StepByStep("swapmoe", Context(1, 4, 1, slots=2))
    for expert in (0, 1):
        run.step([expert], logits=[float(e == expert) for e in range(4)])
    run.step([2, 3], tokens=2, chosen=[[2], [3]], logits=[1.0, 2.0, 3.0, 4.0])
    assert run.demanded == [1]


def prompt(run: StepByStep, rows: list[int], *, new: bool = True) -> list[str]:
    """A prompt of tokens with an expert each; the outcomes of its experts in ascending order."""
    return run.step(
        sorted(set(rows)), tokens=len(rows), chosen=[[e] for e in rows], begins_sequence=new
    )


def test_daop_fills_its_slots_with_the_prompt_s_hottest() -> None:
    run = StepByStep("daop", Context(1, 4, 1, slots=2))
    found = prompt(run, [0, 0, 0, 1, 1, 2])
    # Of equal weight they are in ascending order.
    assert dict(zip(run.demanded, found, strict=True)) == {0: "MISS", 1: "MISS", 2: "COMPUTE"}
    assert run.held == [0, 1]
    assert run.step([3]) == ["COMPUTE"]  # in decoding nothing is copied


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        ([2, 2, 2, 1, 1], [1, 2]),  # 3 > 1.05 x 0: 0 goes
        ([2, 2, 2, 1, 1, 1, 1, 0], [1, 2]),  # 3 > 1.05 x 1, though the prompt uses 0
        ([2, 0, 1, 1], [0, 1]),  # 1 is no more than 1.05 x 1
        ([2, 2, 3, 3, 3, 1, 1, 1, 1, 0], [1, 3]),  # 3 for 0; then 2 is no more than 1.05 x 4
        ([2, 2, 3, 3, 3, 1, 0], [2, 3]),
    ],
)
def test_daop_exchanges_the_hot_with_the_cold(rows: list[int], held: list[int]) -> None:
    run = StepByStep("daop", Context(1, 4, 1, slots=2))
    prompt(run, [0, 0, 0, 1, 1])
    prompt(run, rows)
    assert run.held == held


def test_daop_routes_by_prediction_and_makes_do_where_none_is_there() -> None:
    """Layer 1 has 0. Predicted are 1 and 2, both missing: 1 stays, 0 takes the place of 2."""
    run = StepByStep("daop:first=1", Context(2, 4, 2, slots=1))
    prompt_rows = [[0, 3], [0, 3]]
    run.step([0, 3], 1, tokens=2, chosen=prompt_rows, begins_sequence=True)
    run.step([0, 1], 0, predicted=[[1.0, 3.0, 2.0, 0.0]])
    run.step([2, 3], 1, logits=logits(0.1, 0.2, 0.3, 0.4))
    assert sorted(run.demanded) == [4, 5]


@pytest.mark.parametrize(("first", "demanded"), [(1, [4, 6]), (2, [6, 7])])
def test_daop_begins_at_its_first_layer(first: int, demanded: list[int]) -> None:
    run = StepByStep(f"daop:first={first}", Context(2, 4, 2, slots=4))
    run.step([0, 2], 1, tokens=2, chosen=[[0, 2], [0, 2]], begins_sequence=True)
    run.step([0, 1], 0, predicted=[[3.0, 1.0, 2.0, 0.0]])
    run.step([2, 3], 1, logits=logits(0.1, 0.2, 0.3, 0.4))
    assert sorted(run.demanded) == demanded


def test_a_layer_that_was_not_predicted_keeps_its_gate_s_choice() -> None:
    run = StepByStep("daop:first=0", Context(2, 4, 1, slots=4))
    run.step([0], 0, predicted=[[np.nan] * 4])
    run.step([2], 1)
    assert run.demanded == [6]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pre-gated:staging=-1", "staging must be 0 or more, not -1"),
        ("cache-conditional:sure=9", "strength must be 0 or more, sure 0 to 4"),
        ("moe-eras:alpha=-0.5", "alpha and beta must be 0 or more, not -0.5"),
        ("emoe:period=0", "emoe: period must be 1 or more, not 0"),
        ("swapmoe:period=0", "swapmoe: period must be 1 or more, not 0"),
        ("daop:gain=0.5", "gain must be 1 or more, first 0 or more, not 0.5"),
        ("adapmoe:sensitivity=0.0", "sensitivity must be above 0, not 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(1, 4, 1, 3))
