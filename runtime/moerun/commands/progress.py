"""A progress bar on stderr for work that counts records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def pack_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to tell (records done, records in all); the bar appears with the first.

    Only a terminal gets one; to a file or pipe nothing is written.
    """
    bar = Progress(
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_interactive,  # or stop() ends a line that nothing began
    )
    task = bar.add_task("pack", total=None, visible=False)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, visible=True)

    try:
        yield report
    finally:
        bar.stop()
