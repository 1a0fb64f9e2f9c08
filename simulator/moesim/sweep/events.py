"""The events of a sweep, and the interface of every pool of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from moesim.sweep.point import SweepPoint
from moesim.sweep.worker import Outcome

HOPELESS = 3  # workers in a row that died before they could do anything


class Ready(NamedTuple):
    """A worker has started and waits for points."""

    worker: int


class Finished(NamedTuple):
    """A worker has finished a point, the first of those that it was given."""

    worker: int
    number: int
    outcome: Outcome


class Lost(NamedTuple):
    """A worker is gone; its unfinished points are to be run again."""

    worker: int
    reason: str


PoolEvent = Ready | Finished | Lost


class Connected(NamedTuple):
    """The first message of a cluster's driver: the number of workers."""

    n_workers: int


class Gone(NamedTuple):
    """The last message of a cluster's driver: why no more results can come."""

    reason: str


class Pool(Protocol):
    """Where points are run. Workers are numbered; a replacement has a new number."""

    n_workers: int

    def start(self) -> None:
        """Start the workers. Called once, before any points are given."""

    def give(self, worker: int, points: Sequence[tuple[int, SweepPoint]]) -> None:
        """Give numbered points to a worker that is ready or has finished its last point."""

    def events(self, timeout_s: float) -> list[PoolEvent]:
        """The events since the last call; empty after ``timeout_s``.

        Raises SimulationError when no worker can be started any more.
        """

    def stop(self) -> None:
        """End every worker, even in the middle of a point."""
