"""The constants that a profile takes from a run, and how disturbed measurements are made again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moepolicy import find_policy
from moepolicy.tables import to_csv
from moerun.commands.fidelity import _plain, _table
from moerun.live.sampling import Sampling
from moerun.profiling import fidelity, profiler, undisturbed
from moerun.profiling.compute import ComputeCost, StepTimes, costs
from moerun.profiling.cpu import CpuCost
from moerun.profiling.fidelity import Comparison
from moerun.profiling.link import LinkCost
from moerun.profiling.profiler import MachineProfile
from moerun.profiling.undisturbed import UNDISTURBED_WAIT, Measured, least_disturbed
from moerun.settings import Settings
from moesim.machine.profile import load_machine

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
        monkeypatch.setattr(undisturbed, "waiting_s", lambda: sum(waits_s[: self.made]))

    def measure(self) -> int:
        self.made += 1
        return self.made


def test_a_disturbed_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = Disturbed(monkeypatch, [0.0, 100.0, 0.0, 0.0])
    told: list[int] = []
    found = least_disturbed(disturbed.measure, 2, told.append)
    assert [turn.found for turn in found] == [1, 3]
    assert [turn.waited for turn in found] == [0.0, 0.0]
    assert told == [1, 2, 3]


def test_on_a_busy_machine_the_least_disturbed_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = Disturbed(monkeypatch, [1e12, 10.0, 1e12, 1e12, 1e6, 1e12, 0.0])
    found = least_disturbed(disturbed.measure, 2, lambda _: None)
    assert [turn.found for turn in found] == [2, 5]
    assert all(turn.waited > undisturbed.UNDISTURBED_WAIT for turn in found)
    assert disturbed.made == 6  # three times as many, and no more


def test_the_time_spent_waiting_is_what_linux_says_of_this_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of /proc/thread-self/schedstat: ns on a processor, ns ready to run without one, slices."""
    read: list[str] = []

    def found(path: Path) -> str:
        read.append(str(path))
        return "7000000000 2500000000 12\n"

    monkeypatch.setattr(Path, "read_text", found)
    assert undisturbed.waiting_s() == 2.5
    assert read == ["/proc/thread-self/schedstat"]

    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert undisturbed.waiting_s() == 0.0


def test_the_share_waited_is_of_the_measurement_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([100.0, 104.0])
    waited_s = iter([3.0, 4.0])
    monkeypatch.setattr(undisturbed, "time", SimpleNamespace(perf_counter=lambda: next(now_s)))
    monkeypatch.setattr(undisturbed, "waiting_s", lambda: next(waited_s))
    assert undisturbed._watched(lambda: "found") == ("found", 0.25)


PROFILE = MachineProfile(
    name="mine",
    description="Measured.",
    link=LinkCost(bytes_per_s=1e9, latency_s=2 * US, streams=3),
    compute=ComputeCost(11 * US, 12 * US, 13 * US, 14 * US, 15 * US, 16 * US, 17 * US),
    cpu=CpuCost(2, 21 * US, 22 * US),
    device="cpu",
)


def test_moesim_reads_every_constant_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.to_toml(), encoding="utf-8")
    machine = load_machine(str(path))
    assert (machine.name, machine.description, machine.source) == ("mine", "Measured.", "measured")
    assert machine.device == "cpu"
    link = machine.link
    assert (link.bytes_per_s, link.streams) == (1e9, 3)
    assert link.latency_s == pytest.approx(2 * US)
    assert link.back_to_back
    compute = machine.compute
    assert pytest.approx(astuple(PROFILE.compute)) == (
        compute.token_s,
        compute.layer_s,
        compute.layer_token_s,
        compute.prefetch_s,
        compute.arrival_s,
        compute.expert_s,
        compute.expert_token_s,
    )
    assert machine.cpu is not None
    cpu = machine.cpu
    assert (cpu.workers, cpu.expert_s, cpu.expert_token_s) == pytest.approx((2, 21 * US, 22 * US))


@pytest.mark.parametrize(
    ("waited", "told"), [(0.0, False), (UNDISTURBED_WAIT, False), (0.0201, True)]
)
def test_a_disturbed_profile_is_described_as_one(tmp_path: Path, waited: float, told: bool) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(replace(PROFILE, waited=waited).to_toml(), encoding="utf-8")
    description = load_machine(str(path)).description
    assert (
        "unreliable: other programs kept the measurement waiting for 2 %" in description
    ) == told


def test_a_profile_waited_as_long_as_its_most_disturbed_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake:
        def __init__(self, *_: object) -> None:
            self.turn = None

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def result(self, name: str, turns: list[str]) -> MachineProfile:
            assert (name, turns) == ("mine", ["a", "b", "c"])
            return PROFILE

    turns = [Measured("a", 0.01), Measured("b", 0.3), Measured("c", 0.02)]
    monkeypatch.setattr(profiler, "Profiler", Fake)
    monkeypatch.setattr(profiler, "least_disturbed", lambda *_: turns)
    settings = Settings(find_policy("lru"), slots=1)
    store: Any = None
    assert profiler.measure(store, settings, "mine", repeats=3) == replace(PROFILE, waited=0.3)


COMPARISON = Comparison("lru", 2, 10.0, 11.0, *(0.25,) * 8, live_runs=(9.0, 10.0), waited=0.0)


@pytest.mark.parametrize(
    ("waited", "told"), [(0.0, False), (UNDISTURBED_WAIT, False), (0.38, True)]
)
def test_fidelity_says_that_it_was_disturbed(waited: float, told: bool) -> None:
    rows = [replace(COMPARISON, waited=waited)]
    note = "unreliable: other programs kept these runs waiting for 38 % of their time"
    assert (note in _table(rows, {})) == told
    assert ("unreliable" in _table(rows, {})) == told
    assert _plain(rows, {})[0]["waited"] == waited
    (found,) = csv.DictReader(io.StringIO(to_csv(_plain(rows, {}))))
    kept = [found[name] for name in ("waited", "error", "refused")]
    assert kept == [str(waited), str(rows[0].error), ""]


def test_runs_beside_the_simulator_waited_as_long_as_the_most_disturbed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    totals = SimpleNamespace(requests=4, hits=1, late=1, misses=2, useless_prefetches=0)
    run: Any = SimpleNamespace(tokens_per_s=5.0, totals=totals)
    turns = [
        Measured(fidelity.LiveTurn(None, [run]), 0.1),
        Measured(fidelity.LiveTurn(None, [run]), 0.4),
        Measured(fidelity.LiveTurn(None, [run]), 0.0),
    ]
    simulated = {"slots": 2, "tokens_per_s": 6.0, **vars(totals)}
    monkeypatch.setattr(fidelity, "least_disturbed", lambda *_: turns)
    monkeypatch.setattr(fidelity, "_simulated", lambda *_: simulated)
    store: Any = None
    lru = find_policy("lru")
    (row,) = fidelity.compare(
        store, [lru], Settings(lru, slots=2), "", Sampling(), repeats=3, machine=tmp_path
    )
    assert row.waited == 0.4
    assert (row.live_tokens_per_s, row.simulated_tokens_per_s) == (5.0, 6.0)
