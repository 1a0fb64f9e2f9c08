"""The constants that a profile takes from a run, and how disturbed measurements are made again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moerun.profiling import undisturbed as calm
from moerun.profiling.compute import StepTimes, costs
from moerun.profiling.link import LinkCost
from moerun.profiling.undisturbed import calmest

US = 1e-6
LAYERS = 3
RECORD_BYTES = 200_000
LINK = LinkCost(bytes_per_s=1e9, latency_s=20 * US, streams=1)  # a copy takes 200 us


def decoded(misses: list[int], *, slower_after_stall_s: float = 0.0) -> Iterator[StepTimes]:
    """Steps of two experts of 40 us in layers of 100, tokens of 500 more.

    An expert that is waited for costs 60 us more, half of them after its step.
    """
    now_s, aftermath_s = 0.0, 0.0
    for number, missing in enumerate(misses):
        entered_s = now_s
        experts = [(1, 40 * US)] * 2
        computed_s = (2 - missing) * 40 * US
        arrived_s = LINK.latency_s + missing * 200 * US
        stall_s = 0.0
        if missing:
            # Before the last of two the first one is computed, while that still travels.
            computed_s += (missing - 1) * 40 * US
            stall_s = arrived_s + 30 * US - computed_s
            computed_s += 40 * US
        left_s = entered_s + 10 * US + aftermath_s + computed_s + stall_s
        yield StepTimes(number % LAYERS, 1, entered_s, left_s, stall_s, missing, tuple(experts))
        aftermath_s = slower_after_stall_s if missing else 0.0
        now_s = left_s + 90 * US + 30 * US * (missing > 0)
        if number % LAYERS == LAYERS - 1:
            now_s += 500 * US


def test_the_constants_are_those_of_the_run() -> None:
    steps = list(decoded([0, 0, 0, 1, 0, 2, 0, 0, 1] * 4))
    found = costs(steps, LINK, RECORD_BYTES, 0.0)
    assert found.layer_s == pytest.approx(100 * US)
    assert found.expert_s == pytest.approx(40 * US)
    assert found.arrival_s == pytest.approx(60 * US)
    # The last layers stand still more often here, by a third, and bear that.
    assert found.token_s == pytest.approx(500 * US, rel=0.05)


def test_a_model_of_one_layer_has_costs_too() -> None:
    prompt = StepTimes(0, 5, 0.0, 500 * US, 0.0, 0, ((5, 80 * US), (5, 80 * US)))
    steps = [prompt]
    for number in range(1, 9):
        began_s = number * 1000 * US
        calls = ((1, 40 * US), (1, 40 * US))
        steps.append(StepTimes(0, 1, began_s, began_s + 90 * US, 0.0, 0, calls))
    found = costs(steps, LINK, RECORD_BYTES, 0.0)
    assert found.layer_token_s == 0.0
    assert found.expert_s == pytest.approx(40 * US)
    assert found.expert_token_s == pytest.approx(10 * US)


def test_what_a_stall_leaves_behind_is_the_arrival_s() -> None:
    """Every stall makes the step after it 25 us slower."""
    steps = list(decoded([1, 0, 0, 0] * 9 + [0], slower_after_stall_s=25 * US))
    found = costs(steps, LINK, RECORD_BYTES, 0.0)
    assert found.layer_s == pytest.approx(100 * US)
    assert found.arrival_s == pytest.approx(85 * US)


def test_watching_is_not_the_model_s_to_bear() -> None:
    steps = list(decoded([0, 0, 1] * 4))
    alone = costs(steps, LINK, RECORD_BYTES, 0.0)
    assert costs(steps, LINK, RECORD_BYTES, 7 * US).layer_s == pytest.approx(alone.layer_s - 7 * US)


def test_without_a_stall_nothing_wakes_up() -> None:
    found = costs(list(decoded([0] * 9)), LINK, RECORD_BYTES, 0.0)
    assert found.arrival_s == 0.0
    assert found.token_s == pytest.approx(500 * US)


class Disturbed:
    """Measurements that find their number and wait so long for a processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waits_s: list[float]) -> None:
        self.waits_s = waits_s
        self.made = 0
        monkeypatch.setattr(calm, "waiting_s", lambda: sum(waits_s[: self.made]))

    def measure(self) -> int:
        self.made += 1
        return self.made


def test_a_disturbed_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = Disturbed(monkeypatch, [0.0, 100.0, 0.0, 0.0])
    told: list[int] = []
    found = calmest(disturbed.measure, 2, told.append)
    assert [turn.found for turn in found] == [1, 3]
    assert [turn.waited for turn in found] == [0.0, 0.0]
    assert told == [1, 2, 3]


def test_on_a_busy_machine_the_least_disturbed_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = Disturbed(monkeypatch, [1e12, 10.0, 1e12, 1e12, 1e6, 1e12, 0.0])
    found = calmest(disturbed.measure, 2, lambda _: None)
    assert [turn.found for turn in found] == [2, 5]
    assert all(turn.waited > calm.CALM for turn in found)
    assert disturbed.made == 6  # three times as many, and no more
