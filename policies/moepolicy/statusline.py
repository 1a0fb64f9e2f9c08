"""A line at the bottom of the terminal that says how a run is going, under a text that streams."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Self

from rich.cells import set_cell_size

from moepolicy.console import is_dumb

EVERY_S = 0.5
LOGGED_EVERY_S = 5.0  # where stderr is no terminal that could keep a line at its bottom
SAVE, RESTORE, WIPE = "\x1b7", "\x1b8", "\x1b[2K"


class StatusLine:
    """Shows what ``says`` answers while its block runs: a context manager.

    On a terminal the last row is kept for it, and the text scrolls above. Elsewhere stderr gets a
    line every few seconds.
    """

    def __init__(self, says: Callable[[], str]) -> None:
        self._says = says
        self._on_terminal = sys.stderr.isatty() and not is_dumb()
        self._rows = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status line", daemon=True)

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._reserve()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._on_terminal:
            self._write(f"{SAVE}\x1b[{self._rows};1H{WIPE}\x1b[r{RESTORE}")

    def _run(self) -> None:
        every_s = EVERY_S if self._on_terminal else LOGGED_EVERY_S
        while not self._ended.wait(every_s):
            said = self._says()
            if not self._on_terminal:
                self._write(f"{said}\n")
            elif said:
                self._show(said)

    def _show(self, said: str) -> None:
        columns, rows = shutil.get_terminal_size()
        if rows != self._rows:
            self._reserve()
        fitted = set_cell_size(said, min(columns, len(said) + 1)).rstrip()
        self._write(f"{SAVE}\x1b[{rows};1H{WIPE}\x1b[2m{fitted}\x1b[0m{RESTORE}")

    def _reserve(self) -> None:
        """Keep the last row free of the text: what stands there moves up."""
        self._rows = shutil.get_terminal_size().lines
        self._write(f"\n\x1b[A{SAVE}\x1b[1;{max(self._rows - 1, 1)}r{RESTORE}")

    @staticmethod
    def _write(text: str) -> None:
        # One call of the system's, so that the text of another thread does not come between.
        try:
            os.write(sys.stderr.fileno(), text.encode(errors="replace"))
        except (OSError, ValueError):  # stderr is no file of the system's, or nobody reads it
            sys.stderr.write(text)
