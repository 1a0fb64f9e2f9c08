"""The loop of a sweep: gives points to workers, and writes outcomes into the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moepolicy.refusals import empty_row

from moesim.gap import gap_of
from moesim.sweep.events import Finished, Lost, Pool
from moesim.sweep.journal import SweepJournal
from moesim.sweep.plan import SweepPlan
from moesim.sweep.results import columns
from moesim.sweep.schedule import Schedule
from moesim.sweep.worker import Outcome

TRIES = 2  # a point whose worker dies is given to one other worker
POLL_S = 0.5


def _nobody(*_: object) -> None:
    """Listens to nothing."""


@dataclass
class Watcher:
    """Callbacks of a sweep: points done, points in all, workers; and messages."""

    advance: Callable[[int, int, int], None] = _nobody
    say: Callable[[str], None] = _nobody


@dataclass
class _State:
    """Points under way, by worker in the order they were given, and the number of tries of each."""

    given: dict[int, list[int]] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)


class Sweep:
    """One sweep over the points of ``plan`` that ``journal`` does not have yet."""

    def __init__(
        self, plan: SweepPlan, journal: SweepJournal, watcher: Watcher | None = None
    ) -> None:
        self.plan = plan
        self.journal = journal
        self.watcher = watcher or Watcher()
        self.failed: dict[str, str] = {p.key: p.refused for p in plan.points if p.refused}
        self.refused = set(self.failed)
        """Those of ``failed`` whose policy lacks something that it needs."""
        self._state = _State()
        self._references = plan.references() if plan.grid.limits else {}
        measured = self._measured_from()
        # Points that come to the same (two budgets for as many slots) are run once.
        self._todo = {
            point.key: number
            for number, point in reversed(list(enumerate(plan.points)))
            if point.key not in journal.finished
            and not point.refused
            and (not point.reference or point.key in measured)
        }

    def _measured_from(self) -> set[str]:
        """Keys of the references of points that have not been run."""
        finished = self.journal.finished
        return {
            self._references[point.key]
            for point in self.plan.points
            if point.key in self._references
            and not point.reference
            and "gap_closed_time" not in finished.get(point.key, {})
        }

    @property
    def n_left(self) -> int:
        """Number of points that have not been run."""
        return len(self._todo)

    @property
    def asked_left(self) -> int:
        """Number of the grid's points that are not finished."""
        return len(self.plan.asked & self._todo.keys())

    def run(self, pool: Pool) -> None:
        """Run the points that are left. Finished points are in the journal, even after an error.

        Raises SimulationError when ``pool`` has no more workers, OSError when the journal cannot be
        written.
        """
        total = self.n_left
        try:
            pool.start()
            schedule = Schedule(self.plan, self._todo.values(), pool.n_workers)
            while self._todo:
                for event in pool.events(POLL_S):
                    if isinstance(event, Finished):
                        self._finish(event)
                    elif isinstance(event, Lost):
                        self._lose(event, schedule)
                    else:
                        self._state.given[event.worker] = []
                self._feed(pool, schedule)
                self.watcher.advance(total - self.n_left, total, len(self._state.given))
        finally:
            pool.stop()

    def _feed(self, pool: Pool, schedule: Schedule) -> None:
        for worker, given in self._state.given.items():
            if not given and (numbers := schedule.take(worker)):
                given.extend(numbers)
                pool.give(worker, [(number, self.plan.points[number]) for number in numbers])

    def _finish(self, event: Finished) -> None:
        self._state.given[event.worker].remove(event.number)
        for note in event.outcome.notes:
            if note not in self._state.said:
                self._state.said.add(note)
                self.watcher.say(note)
        self._settle(event.number, event.outcome)

    def _settle(self, number: int, outcome: Outcome) -> None:
        key = self.plan.points[number].key
        del self._todo[key]
        if outcome.row is not None:
            self.journal.add(key, outcome.row)
        else:
            self.failed[key] = outcome.error or "failed without saying why"
            if outcome.refused:
                self.refused.add(key)

    def _lose(self, event: Lost, schedule: Schedule) -> None:
        """Give a dead worker's points to other workers. The point that it was running is tried once
        more."""
        schedule.forget(event.worker)
        given = self._state.given.pop(event.worker, [])
        if not given:
            self.watcher.say(f"{event.reason}; the worker had no point and is replaced")
            return
        at, *rest = given
        for number in reversed(rest):
            schedule.put_back(number)
        name = self.plan.name(self.plan.points[at])
        tries = self._state.tries[at] = self._state.tries.get(at, 0) + 1
        if tries < TRIES:
            self.watcher.say(f"{event.reason} at {name}; the point is tried once more")
            schedule.put_back(at, last=True)
        else:
            self.watcher.say(f"{event.reason} at {name}, for the second time: the point failed")
            self._settle(
                at, Outcome(None, f"{event.reason}, as did the worker that tried the point before")
            )

    def rows(self) -> list[dict[str, Any]]:
        """One row a point of the grid, in the plan's order: the labels of the point, its outcome,
        its figures, and the comparison with LRU."""
        rows = []
        for point in self.plan.points:
            if point.reference:
                continue
            row = self.plan.labels(point)
            error = self.failed.get(point.key)
            if error is not None:
                rows.append(empty_row(columns(), row | {"status": "failed", "error": error}))
            elif point.key in self.journal.finished:
                found = self.journal.finished[point.key]
                base = self.journal.finished.get(self._references.get(point.key, ""))
                gap = gap_of(base, found).row() if base else {}
                rows.append(found | row | gap | {"status": "ok", "error": None})
        return rows
