"""Who may use the bus: one piece of one copy at a time, demanded copies before guesses.

A running piece is not torn up, so a demand waits for one piece of a prefetch and never for all of
it (ProMoE's chunks; the simulator's `SimulatedLink`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Pieces = Callable[[int], Iterator[slice]]
"""The pieces in which so many bytes are to be moved; asking for the next ends the one before."""


@dataclass(eq=False)
class Job:
    """A copy on its way; ``demand`` may turn true while it is."""

    key: int
    slot: int
    low: bool  # at the lower precision
    submitted_s: float  # time.perf_counter
    number: int = 0  # jobs are numbered as they are submitted
    demand: bool = True
    begin_s: float = 0.0  # when a stream took it up


class Turns:
    """Hands the bus from piece to piece."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._holder: Job | None = None

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def take(self, job: Job) -> None:
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

    def give(self, job: Job) -> None:
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
    return not job.demand, job.number
