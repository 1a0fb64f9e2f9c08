"""Columns of rows on disk while an import works out their order: a recording may be larger than
memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDEN_ROWS = 1 << 16


class ColumnFile:
    """One column, [n] or [n, width], that grows at its end and is read at any rows.

    A wider part widens all rows before it, with `fill`; a narrower one is filled up.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], fill: float = 0) -> None:
        self.path, self.dtype, self.fill = path, dtype, fill
        self.width: int | None = None  # None: no part yet; 0: [n]
        self.n_rows = 0
        self._map: np.memmap[Any, Any] | None = None

    def add(self, part: NDArray[Any]) -> None:
        """Append rows, in the column's number type."""
        width = part.shape[1] if part.ndim > 1 else 0
        if self.width is None:
            self.width = width
        elif width > self.width:
            self._widen(width)
        elif width < self.width:
            part = self._filled(part)
        with self.path.open("ab") as file:
            np.ascontiguousarray(part, self.dtype).tofile(file)
        self.n_rows += len(part)

    def rows(self, at: NDArray[np.intp] | slice) -> NDArray[Any]:
        """The rows `at`, copied."""
        if self._map is None:
            shape = (self.n_rows, self.width) if self.width else (self.n_rows,)
            self._map = np.memmap(self.path, self.dtype, "r", shape=shape)
        found = np.array(self._map[at])
        mapping = getattr(self._map, "_mmap", None)
        if isinstance(mapping, mmap.mmap):  # what was read is not to count as memory in use
            mapping.madvise(mmap.MADV_DONTNEED)
        return found

    def _filled(self, part: NDArray[Any]) -> NDArray[Any]:
        whole = np.full((len(part), self.width or 0), self.fill, self.dtype)
        whole[:, : part.shape[1]] = part
        return whole

    def _widen(self, width: int) -> None:
        old, narrow = self.path.with_suffix(".narrow"), self.width or 0
        self.path.rename(old)
        self.width = width
        block = _WIDEN_ROWS * narrow
        with old.open("rb") as source, self.path.open("wb") as target:
            while len(part := np.fromfile(source, self.dtype, block)):
                self._filled(part.reshape(-1, narrow)).tofile(target)
        old.unlink()


class Spool:
    """Columns by name in files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, ColumnFile] = {}

    def add(self, name: str, part: NDArray[Any], fill: float = 0) -> None:
        """Append rows to column `name`, whose first part decides its number type."""
        if name not in self.files:
            self.files[name] = ColumnFile(self.folder / name, part.dtype, fill)
        self.files[name].add(part)

    def rows(self, name: str, at: NDArray[np.intp] | slice) -> NDArray[Any]:
        """The rows `at` of column `name`, copied."""
        return self.files[name].rows(at)
