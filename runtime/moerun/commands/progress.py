"""Bars of packing and of measurements, and warnings of a machine too busy to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moepolicy.console import note
from moepolicy.progress import Bar


@contextmanager
def pack_progress() -> Iterator[Callable[[int, int], None]]:
    """Yields a function to tell (records done, records in all); the bar begins with the first."""
    bar: Bar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = Bar("packing", total, "record")
            bar.__enter__()
            bar.go_on_from(done)
        bar.update(done, total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.__exit__()


@contextmanager
def steps_progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to tell the step that begins now; the bar counts those before it.

    ``steps`` are as many as are known; more steps make the bar longer.
    """
    with Bar("starting", steps) as bar:
        yield bar.begin


def warn_where_busy() -> None:
    """Warn on stderr where the machine is too busy to measure."""
    from moerun.profiling.undisturbed import busy_note

    if (said := busy_note()) is not None:
        warn(said)


def warn(said: str) -> None:
    """A warning on stderr, one line."""
    note(f"warning: {said}", "yellow")
