"""Streaming, crash-safe, resumable writing of traces.

Rows go to numbered part files in `<path>.partial/`, each whole or not there at all, and each with
its CRC-32 in its name; closing joins them under a temporary name and renames that to `path`, so
nothing at `path` is ever half a trace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from moeroute.check import RowChecker
from moeroute.naming import naming_errors
from moeroute.parquet import (
    frame_from_rows,
    join_parts,
    part_of,
    partial_folder,
    read_part,
    write_part,
)
from moeroute.schema import META_KEY, Rows, TraceError, TraceMeta, rows_from_columns

PART_BYTES = 16 << 20
PART_SECONDS = 20.0  # what a killed recording of a slow model may lose


class TraceWriter:
    """Writes one trace.

    A context manager: leaving it normally closes, leaving it by an exception aborts. What one
    `write` call hands over stays together: after a kill it is there as a whole or not at all, so a
    recorder that writes whole sequences resumes at a sequence boundary. `rows_of` is what errors
    about rows name instead of `path`, an importer's input, and `row_name` says where in it row i
    stands. ``counts_missing``: rows of a token's layers may be missing, and the metadata of the
    file says how many are. Raises TraceError for rows that are no
    trace, metadata other than that of the trace to be resumed, or no rows at all.

    The class is long because whatever it does has to leave the folder of parts such that a kill in
    the next moment loses nothing.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        resume: bool = False,
        rows_of: str | None = None,
        row_name: Callable[[int], str] = "row {}".format,
        counts_missing: bool = False,
    ) -> None:
        self.path = Path(path)
        self.meta = meta
        self.has_name = False  # whether the finished trace is at ``path``
        if self.path.is_dir():
            raise TraceError(f"{self.path}: is a folder; give a file's name to write the trace to")
        self.folder = partial_folder(self.path)
        if not self.path.parent.is_dir():
            raise TraceError(f"{self.path}: the folder {self.path.parent} does not exist")
        self._held: int | None = None
        self._counts_missing = counts_missing
        self._check = RowChecker(
            meta, rows_of or str(self.path), row_name, counts_missing=counts_missing
        )
        self._parts = 0
        self._buffer: list[Rows] = []
        self._buffer_bytes = 0
        self._flushed_at = time.monotonic()
        self._open = True
        self.resumed_rows = 0
        self.last_sequence: int | None = None
        """Sequence and position of the last row written, resumed rows included."""
        self.last_position: int | None = None
        self._held = _hold(self.folder)
        try:
            if resume:
                self._resume()
            else:
                self._start()
        except BaseException:
            self._let_go()
            raise

    @property
    def n_rows(self) -> int:
        """Rows handed over so far, resumed ones included."""
        return self._check.n_rows

    def write(self, rows: Rows) -> None:
        """Append rows that come after those written before; their arrays must not change later.

        Raises TraceError, and OSError if the disk is full.
        """
        if not self._open:
            raise TraceError(f"{self.path}: the writer is closed")
        self._check.add(rows)
        if not len(rows):
            return
        self._note_last(rows)
        self._buffer.append(rows)
        self._buffer_bytes += sum(column.nbytes for column in rows.columns().values())
        waited_s = time.monotonic() - self._flushed_at
        if self._buffer_bytes >= PART_BYTES or waited_s >= PART_SECONDS:
            self.flush()

    def note(self, **notes: str) -> None:
        """Add to the notes of the trace that is being written."""
        self.meta = self.meta.with_notes(**notes)

    def flush(self) -> None:
        """Make what was written so far survive a kill."""
        if not self._buffer:
            return
        held = [rows.columns() for rows in self._buffer]
        joined = {name: np.concatenate([columns[name] for columns in held]) for name in held[0]}
        frame = frame_from_rows(rows_from_columns(joined), self.meta)
        part = part_of(frame)
        name = f"part-{self._parts:06d}-{zlib.crc32(part):08x}.arrow"
        with self._finishing(self.folder / name) as unfinished:
            write_part(part, unfinished)
        self._parts += 1
        self._buffer, self._buffer_bytes = [], 0
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Finish the trace: after this, and only after this, there is a file at `path`.

        What was written stays to be resumed if that fails. Raises TraceError, OSError.
        """
        if not self._open:
            return
        try:
            if not self.n_rows:
                raise TraceError(f"{self.path}: not written: there are no rows")
            missing = self._check.finish()
            if self._counts_missing:
                self.meta = replace(self.meta, missing_rows=missing)
            self.flush()
            with self._finishing(self.path) as unfinished:
                join_parts(self._part_paths(), unfinished, {META_KEY: self.meta.to_json()})
        except BaseException:
            self._stop()
            raise
        self.discard()

    def abort(self) -> None:
        """Stop unfinished: what was written stays in the partial folder, for `resume=True`."""
        if not self._open:
            return
        try:
            self.flush()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._open = False
        if not self._parts:  # there is nothing to resume
            self.discard()
        self._let_go()

    def discard(self) -> None:
        """Stop and remove the partial folder."""
        self._open = False
        with suppress(OSError):
            self._empty()
        with suppress(OSError):  # rmtree lets some errors through that it is to ignore
            shutil.rmtree(self.folder, ignore_errors=True)
        self._let_go()

    def _empty(self) -> None:
        """Delete what could be resumed; killed in the middle, its beginning is left."""
        for path in (*reversed(self._part_paths()), self.folder / "meta.json"):
            path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        """Leave the partial folder to others; an empty one goes."""
        if self._held is not None:
            with suppress(OSError):
                self.folder.rmdir()
            os.close(self._held)
            self._held = None

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
        with suppress(OSError, TraceError):  # the disk may be what failed: that is the news
            self.abort()

    def _start(self) -> None:
        strangers = [path for path in self.folder.iterdir() if path.suffix != ".tmp"]
        if strangers and not (self.folder / "meta.json").exists():
            raise TraceError(f"{self.folder}: is in the way and holds no unfinished trace")
        try:
            self._empty()
            with (
                self._finishing(self.folder / "meta.json") as unfinished,
                naming_errors(unfinished),
            ):
                unfinished.write_text(self.meta.to_json(), encoding="utf-8")
        except BaseException:
            self.discard()
            raise

    @contextmanager
    def _finishing(self, path: Path) -> Iterator[Path]:
        """A temporary name to write to; it becomes `path` if that goes well, else nothing."""
        unfinished = self.folder / f"{path.stem}.tmp"
        try:
            yield unfinished
            with naming_errors(path):
                _sync(unfinished)
                unfinished.replace(path)
                self.has_name |= path == self.path
                _sync_folder(path.absolute().parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _resume(self) -> None:
        noted = self.folder / "meta.json"
        if not noted.exists():
            if self.path.exists():
                raise TraceError(f"{self.path}: is whole; there is nothing to resume")
            self._start()
            return
        self._refuse_other_meta(self._begun_as(noted))
        for part in self._part_paths():
            if not part.name.startswith(f"part-{self._parts:06d}"):
                raise TraceError(f"{part}: the part before it is missing: remove {self.folder}")
            rows = rows_from_columns(read_part(part, _crc32_named(part)))
            self._check.add(rows)
            self._note_last(rows)
            self._parts += 1
        self.resumed_rows = self.n_rows

    def _begun_as(self, noted: Path) -> TraceMeta:
        try:
            return TraceMeta.from_json(noted.read_bytes())
        except TraceError as error:
            raise TraceError(
                f"{self.folder}: cannot resume: {noted.name}: {error}; remove it to start over"
            ) from None

    def _refuse_other_meta(self, begun: TraceMeta) -> None:
        old, new = (json.loads(meta.to_json()) for meta in (begun, self.meta))
        for name in new:
            if old[name] != new[name]:
                raise TraceError(
                    f"{self.folder}: cannot resume: it was begun with {name} {old[name]!r}, "
                    f"not {new[name]!r}; use the same settings, or remove it to start over"
                )

    def _part_paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.arrow"))

    def _note_last(self, rows: Rows) -> None:
        self.last_sequence = int(rows.sequence[-1])
        self.last_position = int(rows.position[-1])


def _crc32_named(part: Path) -> int | None:
    """The CRC-32 that a part has in its name; None: it is of a moetrace that wrote none there."""
    _, _, crc32 = part.stem.removeprefix("part-").partition("-")
    return int(crc32, 16) if re.fullmatch("[0-9a-f]{8}", crc32) else None


def _sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk; nothing where folders cannot be read."""
    with suppress(PermissionError):
        _sync(folder)


def _hold(folder: Path) -> int:
    """Make a partial folder, or take it up, for one process at a time; an open descriptor of it.

    Raises TraceError where another process is writing there.
    """
    while True:
        folder.mkdir(exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            import fcntl  # not everywhere

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise TraceError(
                f"{folder}: another process is writing this trace: wait for it to end, or give "
                "another name"
            ) from None
        except (ImportError, OSError):  # a file system without locks
            return fd
        if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
        os.close(fd)  # removed by one that is done, between the two calls
