"""A sweep from its grid to its result file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeroute.parquet import is_url

from moesim.errors import SimulationError
from moesim.sweep.events import Pool
from moesim.sweep.grid import Grid
from moesim.sweep.journal import SweepJournal
from moesim.sweep.loop import Sweep, Watcher
from moesim.sweep.plan import make_plan, none_valid
from moesim.sweep.pool import ProcessPool
from moesim.sweep.ray_pool import RayPool, ray_address
from moesim.sweep.results import is_row, read_finished, suffix_of, table, write

LOCAL = "local"


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep is run; no setting changes the result.

    on        "local", "ray", or a cluster's address
    workers   at a time; None: a worker for every core
    resume    keep the points that an earlier sweep finished, in ``state`` or in the result itself
    restart   throw away the points that an unfinished sweep left in ``state``
    state     folder for finished points until the end; None: next to the result
    """

    on: str = LOCAL
    workers: int | None = None
    resume: bool = False
    restart: bool = False
    state: Path | None = None


@dataclass(frozen=True)
class SweepReport:
    """The outcome of a sweep.

    rows      as they were written
    failures  names of points, and their errors
    refused   number of the failed points whose policy lacks something that it needs
    """

    rows: list[dict[str, Any]]
    failures: dict[str, str]
    kept: int
    ran: int
    refused: int = 0


def run_sweep(
    grid: Grid, out: str, settings: SweepSettings | None = None, watcher: Watcher | None = None
) -> SweepReport:
    """Simulate every point of ``grid`` and write the rows to ``out``, a file or a URL that polars
    can write.

    Points that fail are rows with their error. Raises SimulationError, PolicyError or TraceError
    where the sweep cannot be begun or finished. After such an error, and after a KeyboardInterrupt,
    which then says so, the finished points are kept, and ``resume`` uses them.
    """
    settings, watcher = settings or SweepSettings(), watcher or Watcher()
    if settings.on != LOCAL:
        ray_address(settings.on)
    plan = make_plan(grid)
    for note in plan.notes:
        watcher.say(f"note: {note}")
    suffix_of(out)
    _check_out(out)
    earlier = read_finished(out) if settings.resume or is_url(out) else {}
    with _journal(settings.state or _journal_folder(out), settings) as journal:
        if settings.resume:
            for key, row in earlier.items():
                journal.finished.setdefault(key, row)
            # What is damaged is run again.
            journal.finished = {k: row for k, row in journal.finished.items() if is_row(row)}
        sweep = Sweep(plan, journal, watcher)
        kept = _kept(sweep, watcher)
        todo = sweep.asked_left
        if sweep.n_left:
            with _keeping(sweep):
                sweep.run(_pool(sweep, settings))
        rows = sweep.rows()
        if all(row["status"] == "failed" for row in rows):
            if not journal.finished:
                journal.remove()
            raise none_valid(len(rows), [row["error"] for row in rows])
        with _keeping(sweep):
            write(table(rows), plan, out)
        journal.remove()
    failures = {
        plan.name(point): sweep.failed[point.key]
        for point in plan.points
        if point.key in sweep.failed and not point.reference
    }
    refused = sum(p.key in sweep.refused and not p.reference for p in plan.points)
    return SweepReport(rows, failures, kept=kept, ran=todo, refused=refused)


def _check_out(out: str) -> None:
    """Find out before the sweep, not hours later, that ``out`` cannot be written."""
    if is_url(out):
        return
    path = Path(out)
    if path.is_dir():
        raise SimulationError(f"{out} is a folder, not a file to write the result to")
    if not path.absolute().parent.is_dir():
        raise SimulationError(f"{out}: the folder {path.absolute().parent} does not exist")


def _journal_folder(out: str) -> Path:
    """The folder of finished points: next to the result, or in this folder if the result is at a
    URL."""
    return Path((out.rsplit("/", 1)[-1] if is_url(out) else out) + ".partial")


def _journal(folder: Path, settings: SweepSettings) -> SweepJournal:
    """The journal to continue. Raises SimulationError where it has points and nothing says what to
    do with them."""
    journal = SweepJournal(folder)
    # Perhaps not of a sweep at all: workers read what they share as if one of them wrote it.
    journal.drop_scratch()
    if journal.finished and not settings.resume:
        if not settings.restart:
            n = len(journal.finished)
            journal.close()
            raise SimulationError(
                f"{folder} holds {n} finished points of an unfinished sweep: --resume goes on "
                "from them, --restart throws them away"
            )
        journal.clear()
    return journal


def _kept(sweep: Sweep, watcher: Watcher) -> int:
    """How many of the grid's points are finished already; useless points are reported."""
    keys = {point.key for point in sweep.plan.points}
    found = set(sweep.journal.finished)
    if found - keys:
        watcher.say(
            f"{len(found - keys)} finished points are not in this grid and left out of the result"
        )
    return len(found & sweep.plan.asked)


def _pool(sweep: Sweep, settings: SweepSettings) -> Pool:
    job, journal = sweep.plan.job, sweep.journal
    if settings.on != LOCAL:
        return RayPool(job, settings.on, settings.workers, journal.folder / "ray.log")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPool(job, journal.scratch, min(settings.workers or cores or 1, sweep.n_left))


@contextmanager
def _keeping(sweep: Sweep) -> Iterator[None]:
    """Report the points that are kept when a sweep does not reach its end."""
    try:
        yield
    except (SimulationError, OSError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise SimulationError(f"{where}{reason}; {_left(sweep)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left(sweep)) from None


def _left(sweep: Sweep) -> str:
    journal = sweep.journal
    journal.drop_scratch()
    journal.recount()
    done = len(sweep.plan.asked & journal.finished.keys())
    if not journal.finished:
        journal.remove()
        return "no point was finished"
    total = done + sweep.asked_left
    return f"{done} of {total} points are kept in {journal.folder}: --resume goes on from them"
