"""The expert store: a folder with every expert as one contiguous record, read by position."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moerun.checkpoint.families import read_config
from moerun.errors import RunError
from moerun.format.layout import RecordLayout
from moerun.format.tensorfile import TensorFile, checksum, memory_of, read_at
from moerun.store.index import DENSE_FILE, StoreIndex, read_index

Read = Callable[[Path, int, torch.Tensor], int]
"""Fills a buffer from a file's offset; returns the bytes read. Raises OSError."""

_DIFFERS = "is damaged (its checksum differs)"


class Location(NamedTuple):
    """Where a record lies; `offset` and `nbytes` are multiples of 4096, as O_DIRECT asks."""

    path: Path
    offset: int
    nbytes: int


class ExpertStore:
    """Records by key (layer * n_experts + expert). Safe to share between threads.

    Open with `ExpertStore.open`, which checks that every file is there and whole but reads no
    weights: contents are checked against their CRC-32 as they are read.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.index = index
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._verified = bytearray(self.n_keys)

    @classmethod
    def open(cls, path: str | Path) -> ExpertStore:
        """Raises RunError when the folder is no store, or a file is missing or truncated."""
        folder = Path(path).expanduser()
        store = cls(folder, read_index(folder))
        store._check_files()
        return store

    @property
    def n_layers(self) -> int:
        """MoE layers."""
        return self.index.n_layers

    @property
    def n_experts(self) -> int:
        return self.index.n_experts

    @property
    def n_keys(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def layout(self) -> RecordLayout:
        return self.index.layout

    @property
    def record_bytes(self) -> int:
        return self.index.layout.record_bytes

    @property
    def dense_path(self) -> Path:
        return self.path / DENSE_FILE

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts' records, of attention and of the dense weights."""
        return self.n_keys * self.record_bytes + self.attention_bytes + self.index.dense_bytes

    @property
    def attention_bytes(self) -> int:
        """Bytes of the file of attention; 0 where it is among the dense weights."""
        return self.index.attention.file_bytes if self.index.attention else 0

    @property
    def n_weights(self) -> int:
        """Weights of the model: what the bytes of the store stand for."""
        index = self.index
        dense = sum(math.prod(shape) for _, shape in self.dense_tensors().values())
        attention = index.attention.n_weights if index.attention else 0
        return dense + attention + self.n_keys * index.shape.n_weights

    def config(self) -> Any:
        """The model's configuration, as transformers has it; RunError where it is damaged."""
        return read_config(self.path)

    def dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every weight that is neither an expert's nor packed attention's."""
        with TensorFile(self.dense_path) as file:
            return {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}

    def read_dense(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Read, check and move each of these weights, one in host memory at a time.

        Raises RunError that names file and tensor when it cannot be read or is not what was packed.
        A store from before their checksums were kept has none to compare.
        """
        with TensorFile(self.dense_path) as file:
            for name in file.entries:
                yield name, self._dense_tensor(file, name).to(device)

    def _dense_tensor(self, file: TensorFile, name: str) -> torch.Tensor:
        try:
            tensor = file.read(name, skew=self.index.dense_skew.get(name, 0))
        except OSError as error:
            raise _damaged(name, f"could not be read ({error.strerror})", file.path) from error
        crc32 = self.index.dense_crc32
        if crc32 is not None and checksum(tensor) != crc32.get(name):
            raise _damaged(name, _DIFFERS, file.path)
        return tensor

    def location(self, key: int) -> Location:
        """Raises RunError for a key that the store does not have."""
        layer, expert = self._split(key)
        records = self.index.layers[layer]
        return Location(self.path / records.file, records.offsets[expert], self.record_bytes)

    def read_into(
        self,
        key: int,
        buffer: torch.Tensor,
        *,
        verify: bool | None = None,
        read: Read | None = None,
        pieces: Callable[[int], Iterator[slice]] | None = None,
    ) -> None:
        """Read a record into `buffer`, contiguous uint8[record_bytes] in host memory.

        The interpreter's lock is released meanwhile. `verify` compares the CRC-32; None does it
        the first time this store reads the record. `read` is another way to read,
        `pieces(record_bytes)` the pieces to do it in. Raises RunError that names the file, layer
        and expert when it cannot be read or is not what was packed.
        """
        if buffer.dtype != torch.uint8 or buffer.nbytes != self.record_bytes:
            raise AssertionError(f"{buffer.dtype}[{buffer.nbytes}] for {self.record_bytes} bytes")
        layer, expert = self._split(key)
        where = self.location(key)
        check = verify or (verify is None and not self._verified[key])
        crc32 = self.index.layers[layer].crc32[expert] if check else None
        fill = read or self._read_at
        self._read(where, buffer, crc32, f"expert {expert} of layer {layer}", fill, pieces)
        if check:
            self._verified[key] = 1

    def read_attention(self, module: str, buffer: torch.Tensor) -> None:
        """Read and check the record of a quantised projection of attention, by its module's name.

        `buffer` is as for `read_into`, of the length of that record's layout. Raises RunError
        that names file and module when it cannot be read or is not what was packed.
        """
        attention = self.index.attention
        assert attention is not None
        linear = next(linear for linear in attention.linears if linear.module == module)
        where = Location(self.path / attention.file, linear.offset, buffer.nbytes)
        self._read(where, buffer, linear.crc32, module, self._read_at)

    def _read_at(self, path: Path, offset: int, buffer: torch.Tensor) -> int:
        return read_at(self._fd(path), offset, buffer)

    def _read(
        self,
        where: Location,
        buffer: torch.Tensor,
        crc32: int | None,
        what: str,
        read: Read,
        pieces: Callable[[int], Iterator[slice]] | None = None,
    ) -> None:
        try:
            got = 0
            for piece in pieces(where.nbytes) if pieces else (slice(0, where.nbytes),):
                got += read(where.path, where.offset + piece.start, buffer[piece])
        except OSError as error:
            raise _damaged(what, f"could not be read ({error.strerror})", where.path) from error
        if got != where.nbytes:
            raise _damaged(what, f"is cut off after {got} of {where.nbytes} bytes", where.path)
        if crc32 is not None and zlib.crc32(memory_of(buffer)) != crc32:
            raise _damaged(what, _DIFFERS, where.path)

    def verify(self) -> None:
        """Read everything and compare the checksums. Raises RunError at the first difference."""
        for _ in self.read_dense():
            pass
        buffer = torch.empty(self.record_bytes, dtype=torch.uint8)
        for key in range(self.n_keys):
            self.read_into(key, buffer, verify=True)
        if attention := self.index.attention:
            for linear in attention.linears:
                length = attention.layout(linear).record_bytes
                self.read_attention(linear.module, torch.empty(length, dtype=torch.uint8))

    def close(self) -> None:
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, key: int) -> tuple[int, int]:
        if not 0 <= key < self.n_keys:
            raise RunError(
                f"{self.path} has no expert with key {key}: it has {self.n_layers} layers of "
                f"{self.n_experts} experts"
            )
        return divmod(key, self.n_experts)

    def _fd(self, path: Path) -> int:
        fd = self._fds.get(path.name)
        if fd is None:
            with self._lock:
                fd = self._fds.get(path.name)
                if fd is None:
                    fd = self._fds[path.name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    def _check_files(self) -> None:
        for layer, records in enumerate(self.index.layers):
            self._check_file(records.file, records.file_bytes, f"the experts of layer {layer}")
        if attention := self.index.attention:
            self._check_file(attention.file, attention.file_bytes, "attention")
        TensorFile(self.dense_path).close()

    def _check_file(self, name: str, file_bytes: int, what: str) -> None:
        path = self.path / name
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
