"""Foresight that fetches ahead, by gates and by what has followed, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moepolicy import Context, find_policy
from moepolicy.library.learned.foresight_spec import ASKED_AGAIN, BEGINNING
from support.step_by_step import StepByStep


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
