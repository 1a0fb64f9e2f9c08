"""The journal of finished points: an append-only file that survives a kill.

Each line is one point in JSON. A line that a kill has cut short is dropped, and its point is run
again.
"""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from moepolicy.outputs import drop_tree, naming, remove_tree, sync
from moeroute.jsontext import journal_entries

from moesim.errors import SimulationError

SYNC_S = 1.0  # at most so much work is lost to a power cut, and none to a kill


class SweepJournal:
    """The finished points of one sweep, in a folder that only this sweep may use at a time."""

    def __init__(self, folder: Path) -> None:
        """Open or begin a journal. Raises SimulationError while another process has it open."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._path = folder / "points.jsonl"
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SimulationError(f"{folder} is in use by another sweep") from None
        self.finished = self._read()
        self._synced_at = time.monotonic()

    def __enter__(self) -> SweepJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def scratch(self) -> Path:
        """The folder for files that the sweep can make again."""
        return self.folder / "scratch"

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a finished point: a kill after this call does not lose the point."""
        with naming(self._path):
            self._file.write(json.dumps([key, row]).encode() + b"\n")
            self._file.flush()
        self.finished[key] = row
        if time.monotonic() - self._synced_at > SYNC_S:
            self._sync()
            self._synced_at = time.monotonic()

    def recount(self) -> None:
        """Read the finished points again, after an interruption in the middle of ``add``."""
        self._file.flush()
        self.finished = self._read()

    def clear(self) -> None:
        """Forget every point."""
        self._file.truncate(0)
        self.finished.clear()

    def close(self) -> None:
        """Write buffered points to disk and close the file. May be called again."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def remove(self) -> None:
        """Delete the journal's folder after the result is written."""
        remove_tree(self.folder)
        self._file.close()  # what is deleted needs no sync

    def drop_scratch(self) -> None:
        """Remove the files that workers share while a sweep runs."""
        drop_tree(self.scratch)

    def _sync(self) -> None:
        sync(self._file.fileno(), self._path)

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        rows: dict[str, dict[str, Any]] = {}
        whole = 0
        for end, (key, row) in journal_entries(self._file, 2):
            whole = end
            if isinstance(key, str) and isinstance(row, dict):
                rows[key] = row
        self._file.truncate(whole)
        return rows
