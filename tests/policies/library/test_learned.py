"""Policies that learn, their first lessons worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from moepolicy import Context, PolicyError, find_policy
from moepolicy.library.learned.foresight_spec import ASKED_AGAIN, BEGINNING
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
    assert run.policy.weight[1, 1] == pytest.approx([6 / 13, 2 / 13])
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


def spec_run(copy_over_layer: float, layers: int = 4) -> StepByStep:
    """foresight-spec on layers of 4 experts, top-1, in 2 slots each."""
    return StepByStep(
        "foresight-spec", Context(layers, 4, 1, slots=2, copy_over_layer=copy_over_layer)
    )


def test_foresight_spec_expects_what_a_copy_overlaps() -> None:
    """A layer loads nothing half of the time. Of a copy of 2 layers the first is overlapped for
    certain, the second by half: 1.5, of which a guess for the next layer sees 1; 0.5 is left for a
    load to wait for. Half a layer later it is 0.5 + 0.5 + 0.5 * 0.25 = 1.125 of 2."""
    policy = spec_run(2.0).policy
    assert policy.overlaps(0, 0.0) == pytest.approx(0.5)
    assert policy.idle.tolist() == pytest.approx([0, 1, 1.5, 1.5])
    assert policy.overlaps(0, 0.5) == pytest.approx(0.875)
    assert policy.idle.tolist() == pytest.approx([0, 0.5, 1.0, 1.125])
    # Behind a layer and a half, by when a load has come half of the time.
    assert policy.overlaps(0, 1.5) == pytest.approx(0.5 * 2 - (0.25 + 0.25 + 0.5 * 0.125))


def test_foresight_spec_counts_how_often_guesses_of_a_margin_come_true() -> None:
    """Logits 3, 1, 0, 0: the boundary is at 2, the mean deviation 1 (of 1: 2, 0, 1, 1), the margins
    1 and -1. Of margin 1 each 8 guesses begin as 87 % right; after a right one 7.96 of 9 were, and
    the layer's own one counts beside 8 of those: (1 + 8 * 7.96 / 9) / 9. Of margin -1 3 %."""
    run = spec_run(2.0)
    run.step([0], 0, predicted=[[3.0, 1.0, 0.0, 0.0]])
    policy = run.policy
    assert policy.n_open[0].tolist() == [0, 2, 0, 0]
    assert policy.open[0, 1].tolist() == [4, 5]
    assert policy.bin[0, 1].tolist() == [4 + 4, 4 - 4]
    run.step([0], 1)
    assert policy.chance(0, 1, 8) == pytest.approx((1 + 8 * 7.96 / 9) / 9)
    assert policy.chance(0, 2, 8) == pytest.approx(7.96 / 9)
    assert policy.chance(0, 1, 0) == pytest.approx(8 * 0.24 / 9 / 9)
    assert policy.n_open.sum() == 0


def test_foresight_spec_risks_nothing_by_a_copy_that_soon_ends() -> None:
    """A copy of 0.7 layers that starts now is over before the next gate speaks: the guess is worth
    a chance of 3 %. One that starts 0.2 layers later may not be."""
    policy = spec_run(0.7).policy
    policy.open[0, 1, 0], policy.bin[0, 1, 0], policy.n_open[0, 1] = 5, 0, 1
    none = np.empty(0, np.int32)
    assert policy.best(0, 0.0, none) == 5
    assert policy.expected[0] == pytest.approx(0.03 * 0.7)
    assert policy.best(0, 0.2, none) == -1


def guesses_of(run: StepByStep, right: bool) -> list[int]:
    """How many are fetched in each of 40 passes of two layers, all of it predicted as it comes, or
    as it does not come."""
    found = []
    for number in range(40):
        expert = number * 3 % 4
        said = [[4.0 * (e == (expert if right else (expert + 1) % 4)) for e in range(4)]]
        run.step([expert], 0, predicted=said)
        found.append(len(run.guessed))
        run.step([expert], 1)
    return found


def test_foresight_spec_fetches_while_guesses_come_true() -> None:
    begun = guesses_of(spec_run(1.0, layers=2), right=True)
    assert sum(begun[-20:]) > 5
    wrong = guesses_of(spec_run(4.0, layers=2), right=False)
    assert sum(wrong) < 10
    assert sum(wrong[-20:]) == 0


def test_foresight_spec_waits_for_a_surer_guess_where_a_copy_takes_longer() -> None:
    fast, slow = (guesses_of(spec_run(copy, layers=2), right=True) for copy in (1.0, 40.0))
    assert sum(fast) > sum(slow)


def asked_of(gates: float, right: bool, n_passes: int = 400) -> list[bool]:
    """Whether layer 0's later gates were asked, in each of so many passes of three layers whose
    gates are foreseen well or never; asking takes ``gates`` layers of compute."""
    context = Context(3, 8, 1, slots=2, copy_over_layer=1.0, gates_over_layer=gates)
    run, asked = StepByStep("foresight-spec", context), []
    for number in range(n_passes):
        for layer in range(3):
            asked += [run.cache.wants_predictions(layer)] if layer == 0 else []
            wanted = [(number * 3 + n * n) % 8 for n in range(layer, 4)]
            off = 0 if right else 1
            said = [[4.0 * (e == (one + off) % 8) for e in range(8)] for one in wanted[1:]]
            run.step([wanted[0]], layer, predicted=said[: 2 - layer])
    return asked


def test_foresight_spec_asks_the_gates_while_that_pays() -> None:
    assert all(asked_of(0.01, right=True))
    dear = asked_of(5.0, right=True)
    assert all(dear[:BEGINNING])
    assert [n for n, asked in enumerate(dear[BEGINNING:], BEGINNING) if asked] == [
        n for n in range(BEGINNING, 400) if (n + 1) % ASKED_AGAIN == 0
    ]
    assert sum(asked_of(0.05, right=False)) < 60


def test_foresight_spec_asks_again_once_it_pays() -> None:
    """Guesses are never right for 100 passes, then always: one pass of the 128th begins a trial."""
    layers = 12
    context = Context(layers, 8, 1, slots=2, copy_over_layer=1.0, gates_over_layer=0.05)
    run, asked = StepByStep("foresight-spec", context), []
    for number in range(3 * ASKED_AGAIN):
        asked.append(run.cache.wants_predictions(0))
        wanted = [(number * 3 + layer * number % 5) % 8 for layer in range(layers)]
        for layer in range(layers):
            off = number <= 100
            said = [[4.0 * (e == (w + off) % 8) for e in range(8)] for w in wanted[layer + 1 :]]
            run.step([wanted[layer]], layer, predicted=said[:3])
        assert not run.cache.wants_predictions(layers - 1)  # no layer is later
    assert not any(asked[80:100])
    assert all(asked[-20:])


def ahead_run(layers: int = 3, slots: int = 1, copy_over_layer: float = 0.5) -> StepByStep:
    """foresight-ahead on layers of 4 experts, top-1."""
    context = Context(layers, 4, 1, slots=slots, copy_over_layer=copy_over_layer)
    return StepByStep("foresight-ahead", context)


def test_foresight_ahead_counts_what_follows() -> None:
    """Of the experts of layer 1 that followed expert 0 of layer 0, 3 was one of two; 4 more uses
    count as seen with nothing after them: a share of 1/6, and of 1/5 by the one pass of 2. Twice
    1/6, curved by 2 less that and of 20 bins, is bin 11: 8 * 0.8 * 11/19 of 8 guesses came true."""
    run = ahead_run()
    for expert, followed in ((0, 3), (0, 2), (2, 3)):
        run.step([expert], 0)
        run.step([followed], 1)
    run.step([0], 0)
    policy = run.policy
    assert policy.seen[0, 1].tolist() == [2, 0, 1, 0]
    assert policy.together[0, 1, 0].tolist() == [0, 0, 1, 1]
    policy.add_shares(1, 0)
    assert policy.share == pytest.approx([0, 0, 1 / 6, 1 / 6])
    assert policy.open[0, 1, 0] == 4 + 2  # 3 is in the slot
    assert policy.bin[0, 1, 0] == 11
    assert policy.all_guesses[0].sum() > 20 * 8  # of the passes before


def test_foresight_ahead_takes_the_mean_of_two_layers() -> None:
    """Layer 2 follows expert 1 of layer 1 once, seen once, and expert 0 of layer 0 once: 1/5 of
    each, their mean. For layer 2 from layer 0 alone, the second table speaks."""
    run = ahead_run()
    for layer, expert in ((0, 0), (1, 1), (2, 2), (0, 0)):
        run.step([expert], layer)
    run.policy.add_shares(2, 1)
    assert run.policy.share == pytest.approx([0, 0, 1 / 5, 0])
    run.step([3], 1)
    run.policy.add_shares(2, 0)
    assert run.policy.share == pytest.approx([0, 0, 1 / 10, 0])


def test_foresight_ahead_counts_nothing_across_passes_or_of_a_prompt() -> None:
    run = ahead_run()
    run.step([0], 0)
    run.step([1], 2)  # layer 1 is missing: of layer 0's table two layers on
    run.step([0], 0, tokens=2)
    run.step([3], 1)
    run.step([2], 2)
    assert run.policy.seen[0].sum() == 1  # layer 2 after layer 1
    assert run.policy.seen[1].sum() == 1  # layer 2 after layer 0, in the first pass
    run.step([0, 1], 0, tokens=2)
    assert run.guessed == []


def test_foresight_ahead_fetches_while_what_follows_repeats() -> None:
    """Layer 1 uses 0 to 3 in turn, and so does layer 0: all follows. In a slot each, nothing that
    is kept is used again, and what follows is fetched; not where a copy takes 60 layers."""
    for copy, some in ((0.5, True), (60.0, False)):
        run, found = ahead_run(layers=2, copy_over_layer=copy), []
        for number in range(60):
            run.step([number % 4], 0)
            found += [run.guessed]
            run.step([number % 4], 1)
        assert all(found[-20:]) == some


def test_foresight_ahead_fills_free_slots() -> None:
    """A layer has 3 slots, and uses expert 0 alone: others come where nothing waits, and stay."""
    run = ahead_run(layers=2, slots=3)
    for _ in range(6):
        run.step([0], 0)
        run.step([0], 1)
    assert len([key for key in run.held if key >= 4]) >= 3
    assert 4 in run.held


def test_foresight_ahead_begins_with_what_it_was_fitted_with() -> None:
    run = ahead_run()
    for layer in (0, 1, 2):
        run.step([layer], layer)
    spec = find_policy("foresight-ahead").policy
    learned = run.policy.learned()
    begun: Any = spec(run.context, params=learned)  # type: ignore[call-arg]
    assert (begun.together == run.policy.together).all()
    assert (begun.seen == run.policy.seen).all()
    assert (begun.weight == run.policy.weight).all()
    assert begun.together is not run.policy.together


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
