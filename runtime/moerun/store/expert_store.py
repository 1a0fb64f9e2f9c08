"""The expert store: a folder with every expert as one contiguous record, read by position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moerun.checkpoint.families import read_config
from moerun.errors import RunError
from moerun.format.layout import RecordLayout
from moerun.format.tensorfile import TensorFile
from moerun.store.index import DENSE_FILE, StoreIndex, read_index
from moerun.store.reading import (
    Location,
    Pieces,
    Read,
    RecordReader,
    check_files,
    read_dense,
)


class ExpertStore:
    """Records by key (layer * n_experts + expert). Safe to share between threads.

    Open with `ExpertStore.open`, which checks that every file is there and whole but reads no
    weights: contents are checked against their CRC-32 as they are read.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.index = index
        self._reader = RecordReader()
        self._verified = bytearray(self.n_keys)

    @classmethod
    def open(cls, path: str | Path) -> ExpertStore:
        """Raises RunError when the folder is no store, or a file is missing or truncated."""
        folder = Path(path).expanduser()
        store = cls(folder, read_index(folder))
        check_files(folder, store.index)
        TensorFile(store.dense_path).close()
        return store

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return self.index.n_layers

    @property
    def n_experts(self) -> int:
        """Number of experts of a layer."""
        return self.index.n_experts

    @property
    def n_keys(self) -> int:
        """Keys of the whole model: layers times experts."""
        return self.n_layers * self.n_experts

    @property
    def layout(self) -> RecordLayout:
        """Where each matrix lies in an expert's record."""
        return self.index.layout

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert's record."""
        return self.index.layout.record_bytes

    @property
    def dense_path(self) -> Path:
        """File of the dense weights."""
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

    def dense_dtype(self) -> torch.dtype:
        """In what the model computes: the widest dtype of its dense matrices."""
        found = [
            dtype
            for dtype, shape in self.dense_tensors().values()
            if len(shape) > 1 and dtype.is_floating_point
        ]
        return max(found, key=lambda dtype: dtype.itemsize, default=torch.float32)

    def read_dense(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Read, check and move each of these weights, one in host memory at a time.

        Raises RunError that names file and tensor when it cannot be read or is not what was packed.
        A store from before their checksums were kept has none to compare.
        """
        with TensorFile(self.dense_path) as file:
            for name, tensor in read_dense(file, self.index):
                yield name, tensor.to(device)

    def location(self, key: int) -> Location:
        """Place of a record in its file. Raises RunError for a key that the store does not have."""
        layer, expert = self._split(key)
        records = self.index.layers[layer]
        return Location(self.path / records.file, records.offsets[expert], self.record_bytes)

    def read_into(
        self,
        key: int,
        buffer: torch.Tensor,
        *,
        read: Read | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """Read a record into `buffer`, contiguous uint8[record_bytes] in host memory.

        The interpreter's lock is released meanwhile. The CRC-32 is compared the first time that
        this store reads the record. `read` is another way to read, `pieces(record_bytes)` the
        pieces to do it in. Raises RunError that names the file, layer and expert when it cannot be
        read or is not what was packed.
        """
        if buffer.dtype != torch.uint8 or buffer.nbytes != self.record_bytes:
            raise AssertionError(f"{buffer.dtype}[{buffer.nbytes}] for {self.record_bytes} bytes")
        layer, expert = self._split(key)
        known = bool(self._verified[key])
        self._reader.read(
            self.location(key),
            buffer,
            what=f"expert {expert} of layer {layer}",
            crc32=None if known else self.index.layers[layer].crc32[expert],
            read=read,
            pieces=pieces,
        )
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
        self._reader.read(where, buffer, what=module, crc32=linear.crc32)

    def close(self) -> None:
        """Close its files; a later read opens them again."""
        self._reader.close()

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
