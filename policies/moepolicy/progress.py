"""How far a command is, on stderr: what it does, a bar, the rate and the time left.

A bar appears after two seconds, on a terminal that can move its cursor. Elsewhere nothing is
written. It takes one line, however narrow the terminal is.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

SOON_S = 2.0  # what takes no longer shows nothing
WIDE, NARROW = 90, 56  # columns: all is shown from WIDE on, no bar and no elapsed time below NARROW
PERIOD_S = 3600.0  # that the rate is an average of
Item = TypeVar("Item")


class Rate(ProgressColumn):
    """Items a second, or seconds an item where that is more than one."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate as text."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        if speed >= 1:
            shown = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
            return Text(f"{shown} {plural(self._unit)}/s")
        return Text(f"{1 / speed:.1f} s/{self._unit}")


class _Left(TimeRemainingColumn):
    """The time left, named; nothing while it is not known."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.time_remaining is None:
            return Text("")
        return Text.assemble(super().render(task), " left")


class _Count(MofNCompleteColumn):
    """How many of how many, with commas; nothing where the total is not known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(f"{int(task.completed):,}/{int(task.total):,}", style="progress.download")


class Bar:
    """How far a command is: a context manager around the work.

    Tell it of items one by one (`begin`), or of how many are done (`update`). Without a ``total``
    it shows what is done and for how long.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "step") -> None:
        self._console = Console(stderr=True)
        self.shown = self._console.is_interactive and not self._console.is_dumb_terminal
        self._bar = Progress(
            *_columns(self._console.width, unit, counted=total is not None),
            console=self._console,
            transient=True,
            expand=False,
            speed_estimate_period=PERIOD_S,
        )
        self._task = self._bar.add_task(what, total=total)
        self._begun = 0
        self._timer: threading.Timer | None = None
        self._ended = threading.Lock()

    def __enter__(self) -> Self:
        if self.shown:
            self._timer = threading.Timer(SOON_S, self._appear)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ended.acquire(blocking=False)
        if self._bar.live.is_started:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """The next item begins, and so the one before it is done."""
        total = self._bar.tasks[0].total
        if total is not None:  # more items than were known of make the bar longer
            total = max(total, self._begun + 1)
        self._bar.update(self._task, description=what, completed=self._begun, total=total)
        self._begun += 1

    def update(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """So many items are done, of ``total`` (None: as many as before)."""
        self._bar.update(self._task, completed=done, total=total, description=what)

    def go_on_from(self, done: int) -> None:
        """So many items were done by an earlier run, which says nothing of this one's rate."""
        self._bar.reset(self._task, completed=done)

    def _appear(self) -> None:
        if self._ended.acquire(blocking=False):
            atexit.register(self._console.show_cursor)  # a process that is ended leaves it hidden
            self._bar.start()
            self._ended.release()


def watched(name: str, unit: str, items: Iterable[tuple[str, Item]], total: int) -> Iterator[Item]:
    """The items of (what each is, item), with a bar that names the one under way."""
    with Bar(name, total, unit) as bar:
        for what, item in items:
            bar.begin(what)
            yield item


def plural(unit: str) -> str:
    """Several of a unit: points, policies."""
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def _columns(width: int, unit: str, *, counted: bool) -> list[ProgressColumn]:
    """What there is room for: the description gives way first."""

    def fixed() -> Column:
        return Column(no_wrap=True)

    room = width // 3 if width >= NARROW else max(width - 28, 6)
    room = room if counted else max(width - 10, 6)
    what = Column(no_wrap=True, overflow="ellipsis", max_width=room)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", table_column=what)]
    if not counted:
        return [*columns, TimeElapsedColumn(fixed())]
    if width >= NARROW:
        columns.append(BarColumn(width // 6))
    columns += [_Count(table_column=fixed())]
    columns += [Rate(unit)] if width >= NARROW else []
    columns += [TimeElapsedColumn(fixed())] if width >= WIDE else []
    return [*columns, _Left(table_column=fixed())]
