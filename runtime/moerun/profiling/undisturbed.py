"""Measuring on a machine that has other things to do: how long one waited, and measuring again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

Found = TypeVar("Found")

CALM = 0.02  # of its time that a measurement may wait for a processor
PATIENCE = 3  # times as many measurements as asked for


class Measured(NamedTuple, Generic[Found]):
    """What a measurement found, and the share of its time that it waited for a processor."""

    found: Found
    waited: float


def calmest(
    measure: Callable[[], Found], repeats: int, report: Callable[[int], None]
) -> list[Measured[Found]]:
    """``repeats`` measurements in the order they were made: the least disturbed ones.

    More are made while fewer than that were calm. ``report`` is told the number of each.
    """
    turns: list[Measured[Found]] = []
    while len(turns) < repeats * PATIENCE:
        report(len(turns) + 1)
        turns.append(_watched(measure))
        if sum(turn.waited <= CALM for turn in turns) == repeats:
            break
    bound = sorted(turn.waited for turn in turns)[repeats - 1]
    return [turn for turn in turns if turn.waited <= bound][:repeats]


def _watched(measure: Callable[[], Found]) -> Measured[Found]:
    began_s, before_s = time.perf_counter(), waiting_s()
    found = measure()
    return Measured(found, (waiting_s() - before_s) / (time.perf_counter() - began_s))


def waiting_s() -> float:
    """How long this thread has been ready to run while others had the processors.

    0 where the system does not say (it is Linux that does).
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
