"""Streaming, crash-safe, resumable writing of traces.

Rows go to numbered part files in `<path>.partial/`, each whole or not there at all; closing joins
them under a temporary name and renames that to `path`, so nothing at `path` is ever half a trace.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from moeroute.check import RowChecker
from moeroute.parquet import frame_from_rows, naming_errors, partial_folder, write_frame
from moeroute.schema import META_KEY, Rows, TraceError, TraceMeta, rows_from_columns

PART_BYTES = 16 << 20
PART_SECONDS = 20.0  # what a killed recording of a slow model may lose
LEVEL = 9  # zstd of the finished file


class TraceWriter:
    """Writes one trace.

    A context manager: leaving it normally closes, leaving it by an exception aborts. What one
    `write` call hands over stays together: after a kill it is there as a whole or not at all, so a
    recorder that writes whole sequences resumes at a sequence boundary. `rows_of` is what errors
    about rows name instead of `path`: an importer's input. Raises TraceError for rows that are no
    trace, metadata other than that of the trace to be resumed, or no rows at all.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        resume: bool = False,
        rows_of: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.meta = meta
        self.folder = partial_folder(self.path)
        if not self.path.parent.is_dir():
            raise TraceError(f"{self.path}: the folder {self.path.parent} does not exist")
        self._check = RowChecker(meta, rows_of or str(self.path))
        self._parts = 0
        self._buffer: list[Rows] = []
        self._buffer_bytes = 0
        self._flushed_at = time.monotonic()
        self._open = True
        self.resumed_rows = 0
        self.last_sequence: int | None = None
        """Sequence and position of the last row written, resumed rows included."""
        self.last_position: int | None = None
        if resume:
            self._resume()
        else:
            self._start()

    @property
    def n_rows(self) -> int:
        """Rows handed over so far, resumed ones included."""
        return self._check.n_rows

    def write(self, rows: Rows) -> None:
        """Append rows; they must come after those written before. Raises TraceError, OSError."""
        self._check.add(rows)
        if not len(rows):
            return
        self._note_last(rows)
        self._buffer.append(rows)
        self._buffer_bytes += sum(column.nbytes for column in rows.columns().values())
        waited_s = time.monotonic() - self._flushed_at
        if self._buffer_bytes >= PART_BYTES or waited_s >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what was written so far survive a kill."""
        if not self._buffer:
            return
        held = [rows.columns() for rows in self._buffer]
        joined = {name: np.concatenate([columns[name] for columns in held]) for name in held[0]}
        frame = frame_from_rows(rows_from_columns(joined), self.meta)
        part = self.folder / f"part-{self._parts:06d}.parquet"
        unfinished = part.with_suffix(".tmp")
        write_frame(frame.lazy(), unfinished, {}, level=0)
        unfinished.replace(part)
        self._parts += 1
        self._buffer, self._buffer_bytes = [], 0
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Finish the trace: after this, and only after this, there is a file at `path`."""
        if not self._open:
            return
        if not self.n_rows:
            self.discard()
            raise TraceError(f"{self.path}: not written: there are no rows")
        self._check.finish()
        self.flush()
        import polars as pl

        joined = self.folder / "joined.tmp"
        parts = pl.scan_parquet(self._part_paths(), glob=False)
        write_frame(parts, joined, {META_KEY: self.meta.to_json()}, level=LEVEL)
        joined.replace(self.path)
        self.discard()

    def abort(self) -> None:
        """Stop unfinished: what was written stays in the partial folder, for `resume=True`."""
        if not self._open:
            return
        self.flush()
        if self._parts:
            self._open = False
        else:
            self.discard()

    def discard(self) -> None:
        """Stop and remove the partial folder."""
        self._open = False
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.abort()
        except (OSError, TraceError):  # the disk may be what failed; the first error is the news
            self._open = False

    def _start(self) -> None:
        if self.folder.exists():
            if not (self.folder / "meta.json").exists() and any(self.folder.iterdir()):
                raise TraceError(f"{self.folder}: is in the way and holds no unfinished trace")
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        unfinished = self.folder / "meta.tmp"
        unfinished.write_text(self.meta.to_json(), encoding="utf-8")
        unfinished.replace(self.folder / "meta.json")

    def _resume(self) -> None:
        noted = self.folder / "meta.json"
        if not noted.exists():
            if self.path.exists():
                raise TraceError(f"{self.path}: is whole; there is nothing to resume")
            self._start()
            return
        self._refuse_other_meta(TraceMeta.from_json(noted.read_text(encoding="utf-8")))
        for rows in self._resumed_parts():
            self._check.add(rows)
            self._note_last(rows)
            self._parts += 1
        self.resumed_rows = self.n_rows

    def _refuse_other_meta(self, begun: TraceMeta) -> None:
        old, new = (json.loads(meta.to_json()) for meta in (begun, self.meta))
        for name in new:
            if old[name] != new[name]:
                raise TraceError(
                    f"{self.folder}: cannot resume: it was begun with {name} {old[name]!r}, "
                    f"not {new[name]!r}; use the same settings, or remove it to start over"
                )

    def _resumed_parts(self) -> Iterator[Rows]:
        import polars as pl

        from moeroute.parquet import array_from_series

        for part in self._part_paths():
            with naming_errors(part):
                frame = pl.read_parquet(part, glob=False)
            yield rows_from_columns(
                {series.name: array_from_series(series, str(part)) for series in frame}
            )

    def _part_paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _note_last(self, rows: Rows) -> None:
        self.last_sequence = int(rows.sequence[-1])
        self.last_position = int(rows.position[-1])
