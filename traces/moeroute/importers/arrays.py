"""NumPy arrays in files, read some rows at a time and never unpickled."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import Source
from moeroute.importers.recording import fit
from moeroute.schema import TraceError

_HEADER_BYTES = 1 << 16
_WHOLE_BYTES = 1 << 30  # of an array that has to be read at once
DAMAGES = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error)
"""What reading a damaged archive or array raises."""
HEADER_DAMAGES = (*DAMAGES, SyntaxError, TypeError, tokenize.TokenError)
"""What NumPy raises for a damaged header."""


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order (Fortran's?) and dtype of a .npy file, which is read up to its values. Raises
    one of HEADER_DAMAGES."""
    version = np.lib.format.read_magic(file)
    size = file.read(2 if version == (1, 0) else 4)
    n_bytes = int.from_bytes(size, "little")
    if n_bytes > _HEADER_BYTES:  # NumPy makes room for whatever is said here
        raise ValueError(f"a header of {n_bytes} bytes")
    again = io.BytesIO(size + file.read(n_bytes))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(again)
    return np.lib.format.read_array_header_2_0(again)


class ArrayFile:
    """One array of a .npy file or of a member of an archive, from its first row on.

    `shape` and `dtype` are known from its header. Raises TraceError by `name` where it is damaged,
    holds Python objects, or is not as long as its header says.
    """

    def __init__(self, source: Source, file: IO[bytes], name: str) -> None:
        self._source, self._file, self.name = source, file, name
        try:
            self.shape, self._fortran, self.dtype = read_header(file)
        except HEADER_DAMAGES as error:
            raise self._unreadable((str(error).splitlines() or ["no header"])[0]) from None
        if self.dtype.hasobject:
            raise TraceError(
                f"{source.path}: array {name} holds Python objects, which are never unpickled: "
                "save it as numbers"
            )

    @property
    def bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> NDArray[Any]:
        """All of it. Raises TraceError where it is larger than 1 GiB."""
        if self.bytes > _WHOLE_BYTES:
            raise TraceError(f"{self._source.path}: array {self.name} is larger than 1 GiB")
        flat = self._take(int(np.prod(self.shape, dtype=np.int64)))
        return flat.reshape(self.shape, order="F" if self._fortran else "C")

    def rows(self, n: int) -> Iterator[NDArray[Any]]:
        """Its rows (entries of the first axis), `n` at a time."""
        if self._fortran and len(self.shape) > 1:
            whole = self.whole()
            yield from (whole[start : start + n] for start in range(0, len(whole), n))
            return
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        for start in range(0, self.shape[0], n):
            count = min(n, self.shape[0] - start)
            yield self._take(count * row).reshape(count, *self.shape[1:])

    def _take(self, count: int) -> NDArray[Any]:
        wanted = count * self.dtype.itemsize
        parts = []
        try:
            while wanted and (part := self._file.read(min(wanted, 1 << 24))):
                parts.append(part)
                wanted -= len(part)
        except DAMAGES as error:
            raise self._unreadable(error) from None
        if wanted:
            raise self._unreadable(f"{wanted} bytes are missing")
        found = np.frombuffer(b"".join(parts), self.dtype)
        return found.astype(self.dtype.newbyteorder("="), copy=False)

    def _unreadable(self, why: object) -> TraceError:
        return TraceError(f"{self._source.path}: array {self.name} cannot be read ({why})")


class Archive:
    """The arrays of an .npz, none of which is read until asked for.

    Raises TraceError where the archive is damaged.
    """

    def __init__(self, source: Source, packed: zipfile.ZipFile) -> None:
        self._source, self._packed = source, packed
        suffix = ".npy"
        self._members = {
            info.filename.removesuffix(suffix): info
            for info in packed.infolist()
            if info.filename.endswith(suffix)
        }
        self.names = sorted(self._members)

    def __getitem__(self, name: str) -> ArrayFile:
        if name not in self._members:
            raise TraceError(
                f"{self._source.path}: no array {name}; it has {', '.join(self.names) or 'none'}"
            )
        info = self._members[name]
        self._source.check_unpacked(info.file_size, info.compress_size)
        try:
            found = ArrayFile(self._source, self._packed.open(info), name)
        except (*DAMAGES, RuntimeError, NotImplementedError) as error:  # encrypted, or unknown
            raise TraceError(
                f"{self._source.path}: array {name} cannot be read ({error})"
            ) from None
        if found.bytes > info.file_size:
            raise TraceError(
                f"{self._source.path}: array {name} cannot be read (its header says "
                f"{found.bytes} bytes, and it has {info.file_size})"
            )
        return found

    def number(self, name: str, least: int, most: int) -> int | None:
        """Array `name` as one whole number within bounds; None where there is none."""
        if name not in self.names:
            return None
        return fit(self._source.path, name, self[name].whole(), least, most)


@contextmanager
def archive(source: Source) -> Iterator[Archive]:
    """Open an .npz. Raises TraceError where it is damaged."""
    with source.open() as file:
        try:
            packed = zipfile.ZipFile(file)
        except (*DAMAGES, NotImplementedError) as error:
            raise TraceError(f"{source.path}: truncated or damaged zip archive ({error})") from None
        with packed:
            yield Archive(source, packed)
