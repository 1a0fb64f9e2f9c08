"""The order of copies on the bus: one piece of one copy at a time, demands before prefetches.

A running piece is not interrupted, so a demand waits for one piece of a prefetch and never for all
of it (ProMoE's chunks; the simulator's `SimulatedLink`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moerun.links.slot import Variant

Pieces = Callable[[int], Iterator[slice]]
"""The pieces in which so many bytes are to be moved; asking for the next ends the one before."""


@dataclass(eq=False)
class Job:
    """A copy that was asked for; ``demand`` may turn true until it has ended."""

    key: int
    slot: int
    variant: Variant
    begin_s: float  # when it counts as begun, if a stream is free (time.perf_counter)
    number: int = 0  # jobs are numbered as they are submitted
    demand: bool = True


class BusArbiter:
    """Gives the bus to one job at a time, for one piece."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._holder: Job | None = None

    @property
    def n_waiting(self) -> int:
        """Number of jobs that wait for the bus."""
        return len(self._waiting)

    def acquire(self, job: Job) -> None:
        """Wait for the bus: first the demanded have it, then whoever was submitted first.

        A job that has it keeps it for its next piece, unless one that goes before it waits.
        """
        with self._changed:
            self._waiting.append(job)
            if self._holder is job:
                self._holder = None
                self._changed.notify_all()
            while self._holder is not None or min(self._waiting, key=rank_of) is not job:
                self._changed.wait()
            self._waiting.remove(job)
            self._holder = job

    def release(self, job: Job) -> None:
        """Hand the bus on, if ``job`` has it."""
        with self._changed:
            if self._holder is job:
                self._holder = None
                self._changed.notify_all()

    def want(self, job: Job) -> None:
        """``job`` is demanded from now on."""
        with self._changed:
            job.demand = True
            self._changed.notify_all()


def rank_of(job: Job) -> tuple[bool, int]:
    """Orders jobs: the demanded first, then by number."""
    return not job.demand, job.number
