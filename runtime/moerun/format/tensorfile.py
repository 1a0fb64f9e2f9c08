"""Safetensors files read and written by position: a tensor, a slice of one, or a record.

The safetensors library maps whole files into memory, which a bounded packer cannot afford, and
does not say where a tensor lies, which direct reads need.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moepolicy.outputs import naming, sync
from moeroute.jsontext import parse_json

from moerun.errors import RunError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CACHE_LINE = 64  # what torch aligns its own tensors to
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_READ_BYTES = 1 << 30  # Linux moves at most 2 GiB a call


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `offset` counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class UnreadEntry:
    """Where a tensor lies whose dtype is not in DTYPES: 4- or 6-bit floats, or one newer than this.

    `code` is the dtype as the file's header has it.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def bytes_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8[nbytes], sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, sharing them."""
    return as_bytes(tensor).numpy().data


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of dtype, shape and bytes of a tensor in host memory."""
    # The bytes alone would not tell when the header is what changed.
    described = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
    return zlib.crc32(memory_of(tensor.contiguous()), zlib.crc32(described))


def read_at(fd: int, offset: int, buffer: torch.Tensor) -> int:
    """Fill `buffer` (contiguous, on the CPU) from `offset`; the bytes read, fewer at the end.

    Releases the interpreter's lock while it reads.
    """
    view = memory_of(buffer)
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _READ_BYTES]], offset + done)
        if got == 0:
            break
        done += got
    return done


def bytes_at(fd: int, offset: int, n_bytes: int) -> bytes:
    """Bytes of a file from `offset`, fewer at its end."""
    found = b""
    while len(found) < n_bytes:
        part = os.pread(fd, min(n_bytes - len(found), _READ_BYTES), offset + len(found))
        if not part:
            break
        found += part
    return found


def _open(path: Path) -> int:
    """Raises RunError that says whether the file, or what a link points to, is not there."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise RunError(
                f"{path} is a broken link: {path.readlink()} is not there; download it again"
            ) from error
        raise RunError(
            f"{path} is missing: the checkpoint or store is not complete; download or copy it again"
        ) from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


class TensorFile:
    """One safetensors file, open for reads by position; safe to share between threads.

    `entries` are the tensors that can be read, `unread` those of a dtype that torch has not.
    Raises RunError that names the file when its header or size cannot be right.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _open(path)
        try:
            self.file_bytes = os.fstat(self.fd).st_size
            self.header_bytes, header = self._read_header()
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries: dict[str, TensorEntry] = {}
            self.unread: dict[str, UnreadEntry] = {}
            for name, spec in header.items():
                self._add(name, spec)
            self._check_coverage()
        except OSError as error:
            os.close(self.fd)
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        except BaseException:
            os.close(self.fd)
            raise
        self._close_lock = threading.Lock()

    def _corrupt(self, why: str) -> RunError:
        return RunError(
            f"{self.path} is no whole safetensors file ({why}): download or copy it again"
        )

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        prefix = bytes_at(self.fd, 0, len(_LFS_POINTER))
        if prefix == _LFS_POINTER:
            raise RunError(
                f"{self.path} is a Git LFS pointer, not the file it stands for: run 'git lfs pull' "
                "in its folder, or download it again"
            )
        if len(prefix) < _LENGTH_BYTES:
            raise self._corrupt("it is too short to have a header")
        (length,) = struct.unpack_from("<Q", prefix)
        if length > min(self.file_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise self._corrupt(f"its header claims {length} bytes of {self.file_bytes}")
        try:
            header = parse_json(bytes_at(self.fd, _LENGTH_BYTES, length))
        except ValueError as error:
            raise self._corrupt("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._corrupt("its header is no JSON object")
        return _LENGTH_BYTES + length, header

    def _add(self, name: str, spec: Any) -> None:
        try:
            code, shape = str(spec["dtype"]), tuple(int(size) for size in spec["shape"])
            start, end = (int(value) for value in spec["data_offsets"])
        except KeyError as error:
            raise self._corrupt(f"tensor {name!r} has no {error}") from error
        except (TypeError, ValueError, OverflowError) as error:  # 1e999 is infinite
            raise self._corrupt(f"tensor {name!r} is not described") from error
        if min(start, end - start, *shape, 0) < 0:
            raise self._corrupt(f"tensor {name!r} has a size below zero")
        offset = self.header_bytes + start
        if (dtype := DTYPES.get(code)) is None:
            self.unread[name] = UnreadEntry(name, code, shape, offset, end - start)
            return
        if end - start != bytes_of(dtype, shape):
            raise self._corrupt(f"tensor {name!r} has bytes that do not fit its shape")
        self.entries[name] = TensorEntry(name, dtype, shape, offset, end - start)

    def _check_coverage(self) -> None:
        """The format allows neither gaps nor bytes that belong to two tensors."""
        end = self.header_bytes
        entries: list[TensorEntry | UnreadEntry] = [*self.entries.values(), *self.unread.values()]
        for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
            if entry.offset != end:
                raise self._corrupt(f"tensor {entry.name!r} does not begin where another ends")
            end += entry.nbytes
        if end != self.file_bytes:
            raise self._corrupt(f"it has {self.file_bytes} bytes, its header describes {end}")

    def read(self, name: str, *, skew: int = 0) -> torch.Tensor:
        """A tensor in fresh memory, `skew` bytes past a multiple of 64."""
        entry = self.entries[name]
        return self._read(entry, entry.shape, entry.offset, skew)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """Row `row` along the first dimension, which lies in one piece."""
        return self.read_rows(name, row, row + 1)[0]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows from `start` up to `stop` along the first dimension."""
        entry = self.entries[name]
        row_bytes = entry.nbytes // entry.shape[0]
        shape = (stop - start, *entry.shape[1:])
        return self._read(entry, shape, entry.offset + start * row_bytes)

    def _read(
        self, entry: TensorEntry, shape: tuple[int, ...], offset: int, skew: int = 0
    ) -> torch.Tensor:
        if skew:
            memory = torch.empty(skew + bytes_of(entry.dtype, shape), dtype=torch.uint8)
            tensor = memory[skew:].view(entry.dtype).view(shape)
        else:
            tensor = torch.empty(shape, dtype=entry.dtype)
        with naming(self.path):
            got = read_at(self.fd, offset, tensor)
        if got != tensor.nbytes:
            raise self._corrupt(f"it ends inside tensor {entry.name!r}")
        return tensor

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        with self._close_lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, align: int = 8
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header of a file of these tensors; its data begins at a multiple of `align`.

    Tensors lie one after the other in the order given; the format allows no gaps.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + bytes_of(dtype, shape)
        described[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % align)
    header = struct.pack("<Q", len(text)) + text
    entries = {
        name: TensorEntry(
            name,
            dtype,
            tuple(shape),
            len(header) + described[name]["data_offsets"][0],
            bytes_of(dtype, shape),
        )
        for name, (dtype, shape) in tensors.items()
    }
    return header, entries


class TensorFileWriter:
    """A safetensors file of known tensors, written by position in any order.

    With `resume`, what an earlier writer of the same tensors left in the file stays.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        *,
        align: int = 8,
        resume: bool = False,
    ) -> None:
        self.path = path
        header, self.entries = header_of(tensors, align=align)
        self.total_bytes = len(header) + sum(e.nbytes for e in self.entries.values())
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o644)
        try:
            with naming(path):
                os.ftruncate(self._fd, self.total_bytes)
            self._write_at(0, memoryview(header))
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; safe from several threads at once."""
        entry = self.entries[name]
        if tensor.nbytes != entry.nbytes or tensor.dtype != entry.dtype:
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {entry}")
        self._write_at(entry.offset, memory_of(tensor.contiguous()))

    def read(self, name: str, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8[nbytes of the tensor], with what was written of it."""
        with naming(self.path):
            read_at(self._fd, self.entries[name].offset, buffer)

    def _write_at(self, offset: int, data: memoryview) -> None:
        done = 0
        with naming(self.path):
            while done < len(data):
                done += os.pwrite(self._fd, data[done : done + _READ_BYTES], offset + done)

    def close(self) -> None:
        """Close after the bytes have reached the disk."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                sync(fd, self.path)
            finally:
                os.close(fd)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._fd >= 0:  # do not wait for a disk that may just have failed
            os.close(self._fd)
            self._fd = -1


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    values: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, int]:
    """Write a file of these tensors, one in memory at a time; the checksum of each."""
    crc32 = {}
    with TensorFileWriter(path, tensors) as writer:
        for name, tensor in values:
            writer.write(name, tensor)
            crc32[name] = checksum(tensor)
    return crc32
