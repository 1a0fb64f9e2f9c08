"""Reading records of a store's files: whole, checked against their CRC-32, from any thread."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from moerun.errors import RunError
from moerun.format.tensorfile import TensorFile, checksum, memory_of, read_at
from moerun.store.index import StoreIndex

Read = Callable[[Path, int, torch.Tensor], int]
"""Fills a buffer from a file's offset; returns the bytes read. Raises OSError."""

Pieces = Callable[[int], Iterator[slice]]
"""The pieces, in order, that so many bytes are read in."""

_DIFFERS = "is damaged (its checksum differs)"


class Location(NamedTuple):
    """Where a record lies; `offset` and `nbytes` are multiples of 4096, as O_DIRECT asks."""

    path: Path
    offset: int
    nbytes: int


class RecordReader:
    """Reads records by position and keeps each file open. Safe to share between threads."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(
        self,
        where: Location,
        buffer: torch.Tensor,
        *,
        what: str,
        crc32: int | None,
        read: Read | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """Fill `buffer`, contiguous uint8[nbytes] in host memory, with the record at `where`.

        The interpreter's lock is released meanwhile. `crc32` None: the contents are not checked.
        `read` is another way to read. Raises RunError that names `what` and the file.
        """
        fill = read or self._read_at
        try:
            got = 0
            for piece in pieces(where.nbytes) if pieces else (slice(0, where.nbytes),):
                got += fill(where.path, where.offset + piece.start, buffer[piece])
        except OSError as error:
            raise _damaged(what, f"could not be read ({error.strerror})", where.path) from error
        if got != where.nbytes:
            raise _damaged(what, f"is cut off after {got} of {where.nbytes} bytes", where.path)
        if crc32 is not None and zlib.crc32(memory_of(buffer)) != crc32:
            raise _damaged(what, _DIFFERS, where.path)

    def close(self) -> None:
        """Close the files; the next read opens its file again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def _read_at(self, path: Path, offset: int, buffer: torch.Tensor) -> int:
        return read_at(self._fd(path), offset, buffer)

    def _fd(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is None:
            with self._lock:
                fd = self._fds.get(path)
                if fd is None:
                    fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd


def read_dense(file: TensorFile, index: StoreIndex) -> Iterator[tuple[str, torch.Tensor]]:
    """The dense weights in `file`, read and checked one after the other, on the CPU.

    A store from before their checksums were kept has none to compare. Raises RunError that names
    file and tensor.
    """
    for name in file.entries:
        try:
            tensor = file.read(name, skew=index.dense_skew.get(name, 0))
        except OSError as error:
            raise _damaged(name, f"could not be read ({error.strerror})", file.path) from error
        if index.dense_crc32 is not None and checksum(tensor) != index.dense_crc32.get(name):
            raise _damaged(name, _DIFFERS, file.path)
        yield name, tensor


def check_files(folder: Path, index: StoreIndex) -> None:
    """RunError where a file of records is missing, or is longer or shorter than `index` says."""
    for layer, records in enumerate(index.layers):
        _check_file(folder / records.file, records.file_bytes, f"the experts of layer {layer}")
    if attention := index.attention:
        _check_file(folder / attention.file, attention.file_bytes, "attention")


def _check_file(path: Path, file_bytes: int, what: str) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise RunError(
            f"{path} is missing, which holds {what}: copy the store again or pack it again"
        ) from error
    if found != file_bytes:
        raise RunError(
            f"{path} has {found} bytes instead of {file_bytes}, it holds {what}: "
            "copy the store again or pack it again"
        )


def _damaged(what: str, how: str, path: Path) -> RunError:
    return RunError(f"{what} {how} in {path}: copy the store again or pack it again")
