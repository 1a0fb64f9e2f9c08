"""The tensors of a checkpoint, by name: what every format of files offers, and safetensors."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from moepolicy.outputs import naming

from moerun.checkpoint.folder import weight_files
from moerun.errors import RunError
from moerun.format.coding import Kept
from moerun.format.tensorfile import TensorEntry, TensorFile, UnreadEntry, bytes_at

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_COMPARE_BYTES = 16 << 20  # of each of two tensors that are compared


class Weights(ABC):
    """The tensors of a checkpoint, by the names that its publisher gave them.

    ``path`` is the checkpoint's folder or file, ``dtype`` that of quantised weights once they are
    read. May be shared between threads.
    """

    path: Path
    dtype: torch.dtype = torch.bfloat16

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, including those of a dtype that cannot be read."""

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of all the weights' files."""

    @abstractmethod
    def entry(self, name: str) -> TensorEntry:
        """The tensor's dtype and shape as it is read. Raises KeyError for an unknown name."""

    @abstractmethod
    def unread(self, name: str) -> UnreadEntry | None:
        """The tensor's entry if its dtype cannot be read; else None."""

    @abstractmethod
    def described(self, name: str) -> str:
        """A tensor's file, name, dtype and shape, for messages."""

    @abstractmethod
    def first_float(self) -> torch.dtype | None:
        """The dtype that stock transformers gives the model where its configuration has none."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of the tensor's first dimension."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over names, shapes and samples of the weights, which identifies the checkpoint.

        The samples tell models of one architecture apart; reading every byte would take minutes.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all files. May be called again."""

    def transforms(self, model: Any) -> list[Any]:
        """What turns these tensors into those of ``model``, as transformers' loader takes it."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        found: list[Any] = get_model_conversion_mapping(model)
        return found

    def coding(self, name: str) -> Kept | None:
        """How a record can keep a weight, or one of its rows, in its own bits; None where it
        cannot, or is not quantised."""
        return None

    def read_coded(self, name: str, row: int | None = None) -> Any:
        """A weight that has a coding, or one of its rows, in its own bits (a ``Coded``)."""
        raise NotImplementedError

    def notes(self, kept: str | None) -> Iterator[str]:
        """What a person should know of how quantised weights are taken, a line each. ``kept`` names
        the bits of publication that the experts' native records have, if they do."""
        yield from ()

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One entry of the tensor's first dimension."""
        return self.read_rows(name, row, row + 1)[0]

    def equal(self, name: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two tensors, cast to `dtype`, have the same values; a few rows in memory."""
        one, two = self.entry(name), self.entry(other)
        if one.shape != two.shape or not one.shape:
            return False
        rows = one.shape[0]
        step = max(1, _COMPARE_BYTES * rows // max(one.nbytes, two.nbytes, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first = self.read_rows(name, start, stop).to(dtype)
            if not torch.equal(first, self.read_rows(other, start, stop).to(dtype)):
                return False
        return True

    @staticmethod
    def add_samples(
        digest: hashlib._Hash, fd: int, path: Path, start: int, file_bytes: int
    ) -> None:
        """Add samples of the bytes of an open file from ``start`` to a digest.

        Raises RunError where the file has become shorter than ``file_bytes``.
        """
        last = max(file_bytes - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            offset = start + (last - start) * sample // (_SAMPLES - 1)
            wanted = min(_SAMPLE_BYTES, file_bytes - max(offset, 0))
            with naming(path):
                sampled = bytes_at(fd, max(offset, 0), wanted)
            if len(sampled) != wanted:
                raise RunError(f"{path} was cut off while it was read")
            digest.update(sampled)


class Checkpoint(Weights):
    """The tensors of a folder of safetensors files."""

    def __init__(self, path: Path) -> None:
        """Raises RunError where a file is missing or damaged, two files disagree, or there are
        none."""
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
        """The tensor's dtype, shape and place in its file. Raises KeyError for an unknown name."""
        return self._of[name].entries[name]

    def unread(self, name: str) -> UnreadEntry | None:
        """The tensor's entry if its dtype cannot be read; else None."""
        file = self._unread.get(name)
        return file.unread[name] if file else None

    def described(self, name: str) -> str:
        """A tensor's file, name, dtype and shape, for messages."""
        unread = self.unread(name)
        file = (self._unread if unread else self._of)[name]
        entry = unread or file.entries[name]
        dtype = entry.code if isinstance(entry, UnreadEntry) else str(entry.dtype)
        return f"{file.path}: tensor {name!r} ({dtype.removeprefix('torch.')} {list(entry.shape)})"

    def first_float(self) -> torch.dtype | None:
        """The dtype that stock transformers gives the model where config.json has none."""
        for file in self._files.values():
            for name in sorted(file.entries):
                dtype = file.entries[name].dtype
                if dtype.is_floating_point and dtype.itemsize > 1:
                    return dtype
        return None

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own."""
        return self._of[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of the tensor's first dimension."""
        return self._of[name].read_rows(name, start, stop)

    def digest(self) -> str:
        """SHA-256 over names, shapes and samples of the weights, which identifies the checkpoint.

        The samples tell models of one architecture apart; reading every byte would take minutes.
        """
        digest = hashlib.sha256()
        for name, file in self._files.items():
            shapes = sorted(
                [(e.name, str(e.dtype), e.shape) for e in file.entries.values()]
                + [(e.name, e.code, e.shape) for e in file.unread.values()]
            )
            digest.update(json.dumps([name, file.file_bytes, shapes]).encode())
            self.add_samples(digest, file.fd, file.path, file.header_bytes, file.file_bytes)
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files. May be called again."""
        for file in self._files.values():
            file.close()


def _alike(name: str, one: TensorFile, two: TensorFile) -> bool:
    first, second = one.entries.get(name), two.entries.get(name)
    if first is None or second is None:
        return False
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(
        one.read(name).reshape(-1).view(torch.uint8), two.read(name).reshape(-1).view(torch.uint8)
    )
