"""Policies that learn, their first lessons worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from moepolicy import Context, PolicyError, find_policy
from support.step_by_step import StepByStep


def test_flashmoe_starts_as_the_mean_of_recency_and_frequency() -> None:
    """In pass 5: 0 is 3 passes old and has 3 of the most, 3 uses: 1/3 + 1. 1 is 2 old and has one
    use: 1/2 + 1/3, and goes."""
    run = StepByStep("flashmoe:rate=0.0", Context(1, 4, 1, slots=2))
    for expert in (0, 0, 0, 1, 2):
        run.step([expert])
    assert run.evicted == [1]


def test_flashmoe_steps_down_the_error() -> None:
    """Layer 0's expert 0 was seen in pass 1 with recency 1 and frequency 1, for which the network
    says 1; it is used again in pass 3: 1/2. At rate 0.4 the step is -0.2. Every hidden unit was 1
    and weighed 0.25: the outer weights fall by 0.2, the inner ones and offsets by 0.05."""
    run = StepByStep("flashmoe:rate=0.4", Context(2, 4, 1, slots=2))
    for layer in (0, 1, 1, 0):  # pass 2 has only layer 1
        run.step([0], layer)
    assert run.policy.outer[0] == pytest.approx([0.05] * 4)
    assert run.policy.inner[0, 0] == pytest.approx([0.95, -0.05])
    assert run.policy.inner[0, 1] == pytest.approx([-0.05, 0.95])
    assert run.policy.inner[0, 3] == pytest.approx([0.45, 0.45])
    assert run.policy.offset[0] == pytest.approx([-0.05] * 4)


def test_flashmoe_gives_an_unused_expert_up() -> None:
    """Expert 1 was never used; seen in pass 1, it counts as never in pass 65, and is seen anew."""
    run = StepByStep("flashmoe", Context(1, 2, 1, slots=2))
    for _ in range(64):
        run.step([0])
    assert run.policy.saw_at[1] == 1
    before = run.policy.outer.copy()
    run.step([0])
    assert run.policy.saw_at[1] == 65
    assert not np.array_equal(run.policy.outer, before)


def test_promoe_learns_what_follows() -> None:
    """Probabilities 3/4 and 1/4, after which layer 1 uses expert 1. At rate 1 the step is
    1 / (1 + 9/16 + 1/16) = 8/13: the bias, and the weights 6/13 and 2/13. Seen again, the value is
    8/13 + 4.5/13 + 0.5/13 = 1, and key 3 comes for 2, which a prompt has brought, unlearned."""
    run = StepByStep("promoe:rate=1.0", Context(2, 2, 1, slots=1))
    seen = [math.log(3), 0.0]
    run.step([0], 0, logits=seen)
    assert run.guessed == []
    run.step([1], 1)
    assert run.policy.bias[1] == pytest.approx([0, 8 / 13])
    assert run.policy.weight[1, :, 1] == pytest.approx([6 / 13, 2 / 13])
    run.step([0], 1, tokens=2)
    run.step([0], 0, logits=seen)
    assert run.policy.value[1] == pytest.approx([0, 1])
    assert (run.guessed, run.evicted) == ([3], [2])


def test_promoe_predicts_nothing_for_a_prompt() -> None:
    run = StepByStep("promoe", Context(2, 2, 1, slots=1))
    run.step([0], 0)
    run.step([1], 1)
    run.step([0], 1, tokens=2)
    run.step([0, 1], 0, tokens=2)
    assert run.guessed == []


def test_foresight_learns_a_step_later() -> None:
    """A use adds 1 - 2 ** (-1/16) = 0.0424 to the count, which keeps 0.9576 a step. Step 1 values
    expert 0 at 0.1 (its own use) + 0.2 * 0.0424 = 0.1085. Step 2 uses 1: the value of 0 falls to
    0.2 * 0.0406 = 0.0081. At rate 0.1 the value of 1 at step 1 was to be 1 and was 0, which adds
    0.1; that of 0 was to be 0.87 * 0.0081, and 0.0101 goes. Both lie on the bias and on the one
    signal of step 1, that 0 was used."""
    run = StepByStep("foresight:rate=0.1", Context(1, 4, 1, slots=2))
    kept = 0.5 ** (1 / 16)
    habit = 0.2 * (1 - kept)
    run.step([0])
    assert run.policy.value == pytest.approx([0.1 + habit, 0, 0, 0])
    run.step([1])
    less = 0.1 * (0.87 * habit * kept - 0.1 - habit)
    assert run.policy.bias[0] == pytest.approx([less, 0.1, 0, 0])
    assert run.policy.weight[0, 0] == pytest.approx([0.1 + less, 0.1, 0, 0])
    assert run.policy.value == pytest.approx([habit * kept, 0.1 + habit, 0, 0])
    run.step([2])
    assert run.evicted == [0]


def test_foresight_counts_a_prompt_as_its_tokens() -> None:
    """A prompt of 3 tokens, top-1, used 2 and then 0. It counts as 3 steps, which keep 0.9576 ** 3;
    of them 2 * 2 / (2 * 3) = 2/3 used expert 2, the heavier one, and 1/3 used 0."""
    run = StepByStep("foresight", Context(1, 4, 1, slots=2))
    run.step([2, 0], tokens=3)
    often = 1 - 0.5 ** (3 / 16)
    assert run.policy.uses[0] == pytest.approx([often / 3, 0, often * 2 / 3, 0])


def test_foresight_is_told_by_pairs_and_by_other_layers() -> None:
    """Of layer 1 with 4 experts: a row for each of its experts, 16 for its pairs, 16 for the pairs
    with the layer before; those of layer 0 come first, and layer 0 has no layer before."""
    run = StepByStep("foresight", Context(2, 4, 2, slots=2))
    run.step([3, 1], 0)
    run.step([0, 2], 1)
    assert run.policy.n_rows.tolist() == [3, 7]
    pairs = [4 + 1 * 4 + 3, 36 + 4 + 0 * 4 + 2]
    before = 36 + 4 + 16 + 0 * 4 + 3
    assert run.policy.rows[1, :7].tolist() == [3, 1, pairs[0], 36, 38, pairs[1], before]


def test_foresight_s_window_moves_with_the_layer() -> None:
    """A layer is told by five layers, the outermost ones by the same five as their neighbours."""
    policy: Any = find_policy("foresight:reach=2").build(Context(8, 4, 1, slots=2))
    assert policy.first.tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert policy.window == 5


def test_foresight_tells_values_about_0_apart_by_age() -> None:
    """Unlearned, with no count: an expert just used is worth 0.1 + 0.05, one used n steps ago
    0.05 * 32 / (32 + n). Expert 0 has learned that it is worth -1, which counts as 0; 1 was used a
    step earlier, and goes. By values alone 0 goes."""
    for recent, goes in ((0.05, 1), (0.0, 0)):
        run = StepByStep(f"foresight:rate=0.0,habit=0.0,recent={recent}", Context(1, 4, 1, slots=2))
        for expert in (1, 0):
            run.step([expert])
        run.policy.bias[0, 0] = -1.0
        run.step([2])
        assert run.evicted == [goes]
        if recent:
            worth = [0.05 * 32 / 33, 0.05 * 32 / 34, 0.1 + 0.05]
            assert run.policy.merit[:3] == pytest.approx(worth)


def test_foresight_in_one_cache_for_all_layers_keeps_what_has_its_turn_first() -> None:
    """Three layers share three slots. Each layer's expert 0 has 0.1, for its own use. Seen from the
    last layer, the first is next and the second one later: what waits a third of a pass has
    0.87 ** (1/3) of it, and goes for the last layer's second expert."""
    shared = Context(3, 4, 2, slots=1, scope="global")
    run = StepByStep("foresight:rate=0.0,habit=0.0,recent=0.0", shared)
    for layer, experts in ((0, [0]), (1, [0]), (2, [0, 1])):
        run.step(experts, layer)
    left = [0.1, 0.1 * 0.87 ** (1 / 3), 0.1 * 0.87 ** (2 / 3)]
    assert run.policy.worth[[0, 4, 8]] == pytest.approx(left)
    assert run.evicted == [4]


def test_foresight_takes_a_prompt_s_heavier_experts_for_newer() -> None:
    """A prompt of 3 tokens ends at time 3; its first expert was used then, the second 1/3 before,
    and both are older by a token after the next step."""
    run = StepByStep("foresight", Context(1, 4, 1, slots=3))
    run.step([2, 0], tokens=3)
    run.step([1])
    assert run.policy.last[:3] == pytest.approx([3 - 1 / 3, 4, 3])


def hits_of_a_cycle(policy: str) -> int:
    """Hits among the last 30 of 300 steps that use three experts in turn, in two slots."""
    run = StepByStep(policy, Context(1, 4, 1, slots=2))
    outcomes = [run.step([number % 3])[0] for number in range(300)]
    return outcomes[-30:].count("HIT")


def test_foresight_learns_a_cycle_that_lru_never_hits() -> None:
    """As many hits as are possible: every other use where what is used must be kept, two of three
    where two experts stay and the third always passes by."""
    assert hits_of_a_cycle("lru") == 0
    assert hits_of_a_cycle("foresight:rate=0.1") == 15
    assert hits_of_a_cycle("foresight-bypass:rate=0.1") == 20


def test_foresight_begins_with_what_it_was_fitted_with() -> None:
    context = Context(1, 4, 1, slots=2)
    learned = StepByStep("foresight:rate=0.1", context)
    for expert in (0, 1, 0, 1):
        learned.step([expert])
    spec = find_policy("foresight").policy
    params = {"weight": learned.policy.weight, "bias": learned.policy.bias}
    begun: Any = spec(context, params=params)  # type: ignore[call-arg]
    assert (begun.weight == learned.policy.weight).all()
    assert (begun.bias == learned.policy.bias).all()
    assert begun.bias is not learned.policy.bias


def test_foresight_bypasses_what_is_not_expected_again() -> None:
    """0 and 1 lie there, their counts the greater the more they were used. An expert that was
    never used is worth its own use, 0.1, and passes by what is worth more."""
    run = StepByStep("foresight-bypass:rate=0.0", Context(1, 4, 1, slots=2))
    for expert in (0, 1) * 20:
        run.step([expert])
    assert run.policy.value[0] > 0.05
    run.policy.bias[:] = [[0.2, 0.2, 0.0, 0.0]]
    run.step([2])
    assert run.loaded == [2]
    assert 2 not in run.held
    assert {0, 1} <= set(run.held)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("promoe:n=5", "promoe: n must be 0 to 4, not 5"),
        ("promoe:rate=2.0", "promoe: rate must be 0 or more and below 2, not 2.0"),
        ("foresight:discount=1.0", "foresight: discount must be 0 or more, below 1: 1.0"),
        ("foresight-bypass:rate=0.5", "foresight: rate must be from 0 to 0.4, not 0.5"),
        ("foresight:pairs=-1", "foresight: pairs must be 0 or more, not -1"),
        ("foresight:habit=2.0", "foresight: habit must be from 0 to 1, not 2.0"),
        ("foresight:recent=-0.1", "foresight: recent must be from 0 to 1, not -0.1"),
        ("foresight-ahead:staging=0", "foresight-ahead: staging must be 1 or more, not 0"),
        ("foresight-ahead:unseen=0.0", "foresight-ahead: unseen must be more than 0, not 0.0"),
        ("foresight-spec:staging=0", "foresight-spec: staging must be 1 or more, not 0"),
        ("foresight:reach=-1", "foresight: reach must be 0 or more, not -1"),
        ("flashmoe:rate=-0.5", "flashmoe: rate must be from 0 to 1, not -0.5"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(1, 4, 1, 3))
