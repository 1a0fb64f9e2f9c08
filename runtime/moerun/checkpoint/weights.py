"""The tensors of a checkpoint's safetensors files, by name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from moerun.checkpoint.folder import weight_files
from moerun.errors import RunError
from moerun.format.tensorfile import TensorEntry, TensorFile, UnreadEntry

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_COMPARE_BYTES = 16 << 20  # of each of two tensors that are compared


class Checkpoint:
    """The tensors of a folder of safetensors files, by name. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        """Raises RunError when a file is missing or damaged, two disagree, or there are none."""
        self.path = path
        self._files: dict[str, TensorFile] = {}
        self._of: dict[str, TensorFile] = {}
        self._unread: dict[str, TensorFile] = {}
        try:
            for name in weight_files(path):
                file = self._files[name] = TensorFile(path / name)
                self._add(file)
        except BaseException:
            self.close()
            raise

    def _add(self, file: TensorFile) -> None:
        for name in (*file.entries, *file.unread):
            other = self._of.get(name) or self._unread.get(name)
            if other is not None and not _alike(name, other, file):
                raise RunError(
                    f"{other.path} and {file.path.name} hold different tensors {name!r}: one of "
                    "the files is of another checkpoint; download both again"
                )
        self._of.update(dict.fromkeys(file.entries, file))
        self._unread.update(dict.fromkeys(file.unread, file))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, including those of a dtype that cannot be read."""
        return [*self._of, *self._unread]

    @property
    def total_bytes(self) -> int:
        """Bytes of all the weights' files."""
        return sum(file.file_bytes for file in self._files.values())

    def entry(self, name: str) -> TensorEntry:
        """The tensor's dtype, shape and place in its file. Raises KeyError where there is none."""
        return self._of[name].entries[name]

    def unread(self, name: str) -> UnreadEntry | None:
        """The tensor's entry if its dtype is one that cannot be read."""
        file = self._unread.get(name)
        return file.unread[name] if file else None

    def described(self, name: str) -> str:
        """A tensor's file, name, dtype and shape, as messages have them."""
        unread = self.unread(name)
        file = (self._unread if unread else self._of)[name]
        entry = unread or file.entries[name]
        dtype = entry.code if isinstance(entry, UnreadEntry) else str(entry.dtype)
        return f"{file.path}: tensor {name!r} ({dtype.removeprefix('torch.')} {list(entry.shape)})"

    def first_float(self) -> torch.dtype | None:
        """The dtype that stock transformers takes for the model's where config.json has none."""
        for file in self._files.values():
            for name in sorted(file.entries):
                dtype = file.entries[name].dtype
                if dtype.is_floating_point and dtype.itemsize > 1:
                    return dtype
        return None

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own."""
        return self._of[name].read(name)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One entry of the tensor's first dimension."""
        return self._of[name].read_row(name, row)

    def equal(self, name: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two tensors, cast to `dtype`, have the same values; a few rows in memory."""
        one, two = self.entry(name), self.entry(other)
        if one.shape != two.shape or not one.shape:
            return False
        rows = one.shape[0]
        step = max(1, _COMPARE_BYTES * rows // max(one.nbytes, two.nbytes, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first = self._of[name].read_rows(name, start, stop).to(dtype)
            if not torch.equal(first, self._of[other].read_rows(other, start, stop).to(dtype)):
                return False
        return True

    def digest(self) -> str:
        """SHA-256 over names, shapes and samples of the weights: which checkpoint it is.

        The samples tell models of one architecture apart; every byte would take minutes.
        """
        digest = hashlib.sha256()
        for name, file in self._files.items():
            shapes = sorted(
                [(e.name, str(e.dtype), e.shape) for e in file.entries.values()]
                + [(e.name, e.code, e.shape) for e in file.unread.values()]
            )
            digest.update(json.dumps([name, file.file_bytes, shapes]).encode())
            last = max(file.file_bytes - _SAMPLE_BYTES, 0)
            for sample in range(_SAMPLES):
                offset = file.header_bytes + (last - file.header_bytes) * sample // (_SAMPLES - 1)
                digest.update(os.pread(file.fd, _SAMPLE_BYTES, max(offset, 0)))
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files. Harmless when repeated."""
        for file in self._files.values():
            file.close()


def _alike(name: str, one: TensorFile, two: TensorFile) -> bool:
    first, second = one.entries.get(name), two.entries.get(name)
    if first is None or second is None:
        return False
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(
        one.read(name).reshape(-1).view(torch.uint8), two.read(name).reshape(-1).view(torch.uint8)
    )
