"""Measuring on a machine that has other things to do: whether it is too busy to measure at all, how
long one waited, and measuring again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

Found = TypeVar("Found")

UNDISTURBED_WAIT = 0.02  # share of its time that a measurement may wait for a processor
PATIENCE = 3  # times as many measurements as asked for
_PROBES = 15  # short measurements that show how busy the machine is
_PROBE_LOOPS = 200_000  # of a few ms
_STEADY_SPREAD = 0.25  # by how much their median may be longer than the shortest


class Measured(NamedTuple, Generic[Found]):
    """What a measurement found, and the share of its time that it waited for a processor."""

    found: Found
    waited: float


def least_disturbed(
    measure: Callable[[], Found],
    repeats: int,
    report: Callable[[int], None] = lambda _: None,
    within_s: float | None = None,
) -> list[Measured[Found]]:
    """``repeats`` measurements in the order they were made: the least disturbed ones.

    More are made, up to PATIENCE times ``repeats``, until ``repeats`` of them waited no more than
    UNDISTURBED_WAIT of their time. ``report`` is told the number of each. None begins that would
    likely end after ``within_s`` seconds, so that there may be fewer, but one.
    """
    turns: list[Measured[Found]] = []
    began_s = time.monotonic()
    while len(turns) < repeats * PATIENCE:
        took_s = time.monotonic() - began_s
        if turns and within_s is not None and took_s * (1 + 1 / len(turns)) > within_s:
            break
        report(len(turns) + 1)
        turns.append(_watched(measure))
        if sum(turn.waited <= UNDISTURBED_WAIT for turn in turns) == repeats:
            break
    bound = sorted(turn.waited for turn in turns)[:repeats][-1]
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


def busy_note() -> str | None:
    """What says that the machine is too busy to measure, as a line; None where it is not.

    Looks at the load average, which other programs of the last minute made, and at some short
    measurements of the same work: how long they waited for a processor, and how far they differ.
    Takes some tenths of a second.
    """
    signs = [sign for sign in (_load_sign(), *_probe_signs()) if sign]
    if not signs:
        return None
    return (
        f"this machine is busy ({'; '.join(signs)}): what is measured now is slower than it would "
        "be; end other programs, or measure later"
    )


def waited_note(waited: float) -> str | None:
    """A line for a measurement that waited this share of its time; None for an undisturbed one."""
    if waited <= UNDISTURBED_WAIT:
        return None
    return (
        f"unreliable: other programs kept the measurement waiting for {100 * waited:.0f} % of the "
        "time"
    )


def _load_sign() -> str | None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    others = load - 1  # this process has been starting
    return f"load average {load:.1f} on {cores} cores" if others >= (cores or 1) else None


def _probe_signs() -> list[str | None]:
    probes = [_watched(_probe) for _ in range(_PROBES)]
    took_s = sorted(probe.found for probe in probes)
    waited = sum(p.waited * p.found for p in probes) / sum(took_s)
    spread = took_s[_PROBES // 2] / took_s[0] - 1
    return [
        f"a short measurement waited {100 * waited:.0f} % of its time for a processor"
        if waited > UNDISTURBED_WAIT
        else None,
        f"equal work took {100 * spread:.0f} % longer in the median than at best"
        if spread > _STEADY_SPREAD
        else None,
    ]


def _probe() -> float:
    """Seconds that some fixed work takes."""
    began_s = time.perf_counter()
    for _ in range(_PROBE_LOOPS):
        pass
    return time.perf_counter() - began_s
