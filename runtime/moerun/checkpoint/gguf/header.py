"""The header of a GGUF file: its metadata, and where each tensor lies.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. Readers of other
libraries believe the counts of a header; this one holds every count against the size of the file
first, so a damaged header costs neither memory nor time.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moerun.errors import RunError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LIKELY = 1000  # versions that there may be one day; numbers above it are no version
_ALIGNMENT = 32  # where general.alignment is not given
_MAX_DIMS = 4  # GGML_MAX_DIMS
_LFS_POINTER = b"version https://git-lfs"
# Format and bytes of each metadata type of a fixed size, by its number.
_SCALARS = {
    **{0: ("<B", 1), 1: ("<b", 1), 2: ("<H", 2), 3: ("<h", 2), 4: ("<I", 4), 5: ("<i", 4)},
    **{6: ("<f", 4), 7: ("<?", 1), 10: ("<Q", 8), 11: ("<q", 8), 12: ("<d", 8)},
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape in torch's order, its ggml type, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself. Arrays of strings are given as their lengths."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header_bytes: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family; RunError where the file does not say it, as the
        later parts of a split model."""
        if not isinstance(name := self.metadata.get("general.architecture"), str):
            raise RunError(
                f"{self.path} is damaged (it has no general.architecture): download it again"
            )
        return name


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes or, where these are damaged, by its name."""
    if not path.is_file():
        return False
    return path.suffix == ".gguf" or _first_bytes(path) == MAGIC


def read_header(path: Path, strings: Collection[str] = ()) -> GgufHeader:
    """The header of one file; the arrays of strings that ``strings`` names are read in full.

    Raises RunError where the file cannot be read, is cut off, or is no GGUF of a known version.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC):
                raise RunError(f"{path} is no GGUF file (it has {size} bytes): download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped, strings).header()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Walks over the bytes of a header; every step stays within the file."""

    def __init__(self, path: Path, data: mmap.mmap, strings: Collection[str]) -> None:
        self._path = path
        self._data = data
        self._at = 0
        self._strings = strings

    def header(self) -> GgufHeader:
        n_tensors, n_fields = self._beginning()
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self._string()
            metadata[key] = self._value(self._scalar(4), whole=key in self._strings)
        described = [self._described() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for each in described:
            if each[0] in tensors:
                raise self._damaged(f"it has tensor {each[0]!r} twice")
            tensors[each[0]] = self._placed(*each, start=start, alignment=alignment)
        return GgufHeader(self._path, metadata, tensors, start, len(self._data))

    def _beginning(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata fields."""
        first = self._data[: len(_LFS_POINTER)]
        if first == _LFS_POINTER:
            raise RunError(
                f"{self._path} is a pointer of Git LFS, not the file itself: run 'git lfs pull'"
            )
        if not first.startswith(MAGIC):
            raise RunError(
                f"{self._path} is no GGUF file: it begins with {first[:4]!r}, not {MAGIC!r}; "
                "download it again"
            )
        self._at = len(MAGIC)
        version = self._scalar(4)
        if version not in _VERSIONS:
            raise self._of_version(version)
        n_tensors, n_fields = self._scalar(10), self._scalar(10)
        # The shortest tensor takes 24 bytes of the header, the shortest field 13.
        self._room(24 * n_tensors + 13 * n_fields, f"{n_tensors} tensors and {n_fields} fields")
        return n_tensors, n_fields

    def _of_version(self, version: int) -> RunError:
        known = " and ".join(map(str, _VERSIONS))
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            what = "is GGUF of a big-endian machine: convert it for little-endian ones"
        elif not 0 < version <= _LIKELY:
            return self._damaged(f"its header says version {version}")
        elif version > max(_VERSIONS):
            what = f"is GGUF version {version}, newer than {known}, which are read: update moerun"
        else:
            what = f"is GGUF version {version}, only {known} are read: download a newer file"
        return RunError(f"{self._path} {what}")

    def _room(self, n_bytes: int, what: str) -> None:
        """RunError where the file ends before ``n_bytes`` more."""
        if n_bytes > len(self._data) - self._at:
            raise RunError(
                f"{self._path} is cut off or damaged: its header says {what} where the file, of "
                f"{len(self._data):,} bytes, ends; download it again"
            )

    def _damaged(self, what: str) -> RunError:
        return RunError(f"{self._path} is damaged ({what}): download it again")

    def _scalar(self, kind: int) -> Any:
        layout, size = _SCALARS[kind]
        self._room(size, "more")
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += size
        # A 32-bit float as it was written, such as 1e-6, not the nearest one of 64 bits.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _bytes(self) -> bytes:
        length = self._scalar(10)
        self._room(length, f"a text of {length:,} bytes")
        self._at += length
        return self._data[self._at - length : self._at]

    def _string(self) -> str:
        raw = self._bytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a name in its header is no UTF-8") from error

    def _value(self, kind: int, *, whole: bool) -> Any:
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind == _STRING:
            return self._bytes().decode("utf-8", "replace")
        if kind != _ARRAY:
            raise self._damaged(f"it has a field of the unknown type {kind}")
        of, count = self._scalar(4), self._scalar(10)
        if of in _SCALARS:
            return self._numbers(of, count)
        if of != _STRING:
            raise self._damaged(f"it has a list of the unknown type {of}")
        self._room(8 * count, f"a list of {count:,} texts")
        if whole:
            return [self._bytes().decode("utf-8", "replace") for _ in range(count)]
        for _ in range(count):
            self._bytes()
        return count

    def _numbers(self, kind: int, count: int) -> list[Any]:
        layout, size = _SCALARS[kind]
        self._room(size * count, f"a list of {count:,} numbers")
        values = struct.unpack_from(f"<{count}{layout[1]}", self._data, self._at)
        self._at += size * count
        return list(values)

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor of the table."""
        name, n_dims = self._string(), self._scalar(4)
        if n_dims > _MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {n_dims} dimensions")
        fastest_first = [self._scalar(10) for _ in range(n_dims)]
        return name, tuple(reversed(fastest_first)), self._scalar(4), self._scalar(10)

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int
    ) -> GgufTensor:
        from moerun.checkpoint.gguf.blocks import block_of

        block = block_of(kind)
        if block is None:
            raise RunError(
                f"{self._path}: tensor {name!r} is of ggml type {kind}, which is not known here: "
                "update the package gguf (pip install -U gguf), or give a file of another type"
            )
        elements, block_bytes = block
        if not shape or shape[-1] % elements or offset % alignment:
            raise self._damaged(f"tensor {name!r} of shape {list(shape)} lies at {offset}")
        nbytes = prod(shape) // elements * block_bytes
        if start + offset + nbytes > len(self._data):
            raise RunError(
                f"{self._path} is cut off: tensor {name!r} takes bytes {start + offset:,} to "
                f"{start + offset + nbytes:,} of a file of {len(self._data):,}; download it again"
            )
        return GgufTensor(name, shape, kind, start + offset, nbytes)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError:
        return b""
