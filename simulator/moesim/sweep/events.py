"""What a sweep is told while it runs, and where its points are run: the interface of every pool."""

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
    """A worker is done with a point, the first of those it was given."""

    worker: int
    number: int
    outcome: Outcome


class Lost(NamedTuple):
    """A worker is gone, with what it had not finished."""

    worker: int
    reason: str


PoolEvent = Ready | Finished | Lost


class Connected(NamedTuple):
    """The first word of a cluster's driver: how many workers the sweep will have."""

    n_workers: int


class Gone(NamedTuple):
    """The last word of a cluster's driver: why there can be no more results."""

    reason: str


class Pool(Protocol):
    """Where points are run. Workers are numbered; a replacement has a new number."""

    n_workers: int

    def start(self) -> None:
        """Start the workers. Once, before anything is given."""

    def give(self, worker: int, points: Sequence[tuple[int, SweepPoint]]) -> None:
        """Hand numbered points to a worker that is ready or has finished its last."""

    def events(self, timeout_s: float) -> list[PoolEvent]:
        """What has happened; empty after ``timeout_s``. Raises SimulationError when no worker
        can be had any more."""

    def stop(self) -> None:
        """End every worker, whatever it is doing."""
