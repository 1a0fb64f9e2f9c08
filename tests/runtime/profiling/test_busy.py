"""Whether a machine is too busy to measure: told by its load, by waiting, and by the spread."""

from __future__ import annotations

import os

import pytest
from moerun.commands.progress import warn_where_busy
from moerun.profiling import undisturbed


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine on which equal work takes equal time; the list is what the next probes take."""
    took: list[float] = []
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(undisturbed, "waiting_s", lambda: 0.0)
    monkeypatch.setattr(undisturbed, "_probe", lambda: took.pop() if took else 0.01)
    return took


@pytest.mark.usefixtures("calm")
def test_a_calm_machine_is_not_warned_of() -> None:
    assert undisturbed.busy_note() is None


@pytest.mark.usefixtures("calm")
def test_programs_of_the_last_minute_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (9.4, 0.0, 0.0))
    note = undisturbed.busy_note()
    assert note is not None
    assert "load average 9.4 on 2 cores" in note
    warn_where_busy()
    assert capsys.readouterr().err.splitlines() == [f"warning: {note}"]


@pytest.mark.usefixtures("calm")
def test_waiting_for_a_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter(range(1000))
    monkeypatch.setattr(undisturbed, "waiting_s", lambda: float(next(waits)))
    note = undisturbed.busy_note()
    assert note is not None
    assert "% of its time for a processor" in note


def test_equal_work_that_takes_unequal_time_is_told(calm: list[float]) -> None:
    calm += [0.01, *[0.02] * 14]
    note = undisturbed.busy_note()
    assert note is not None
    assert "equal work took 100 % longer in the median than at best" in note
