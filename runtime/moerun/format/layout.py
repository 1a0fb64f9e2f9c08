"""How one expert lies in its record: parts at aligned offsets, alike for all of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moerun.format.names import RECORD_ALIGN
from moerun.format.tensorfile import DTYPE_NAMES, DTYPES, as_bytes, bytes_of

PartSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a part of a record."""

PART_ALIGN = 256  # what vector loads on the CPU and coalesced ones on a GPU ask for


def align_up(value: int, to: int) -> int:
    """The least multiple of ``to`` that is no less than ``value``."""
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a record; `offset` in bytes from the record's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return bytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The parts of a record and its length, a multiple of 4096 bytes."""

    parts: tuple[Part, ...]
    record_bytes: int

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        skews: Mapping[str, int] | None = None,
    ) -> RecordLayout:
        """Lay tensors (name, dtype, shape) one after the other, aligned but for `skews` bytes."""
        parts, position = [], 0
        for name, dtype, shape in tensors:
            offset = align_up(position, PART_ALIGN) + (skews or {}).get(name, 0)
            parts.append(Part(name, dtype, shape, offset))
            position = parts[-1].offset + parts[-1].nbytes
        return cls(tuple(parts), align_up(position, RECORD_ALIGN))

    @property
    def data_bytes(self) -> int:
        """Bytes of the parts alone, without alignment and rounding up."""
        return sum(part.nbytes for part in self.parts)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts as views into `buffer`, uint8[>= record_bytes], on whatever device it lies.

        The buffer must begin at a multiple of 16 bytes in memory; nothing is copied.
        """
        return {
            part.name: buffer[part.offset : part.offset + part.nbytes]
            .view(part.dtype)
            .view(part.shape)
            for part in self.parts
        }

    def write(self, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> None:
        """Lay `tensors` into `buffer`, uint8[record_bytes]; the gaps become zero."""
        if tensors.keys() != {part.name for part in self.parts}:
            raise AssertionError(f"record of {sorted(tensors)} for {self}")
        buffer.zero_()
        for part in self.parts:
            tensor = tensors[part.name]
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise AssertionError(f"{tensor.dtype} {tuple(tensor.shape)} for {part}")
            buffer[part.offset : part.offset + part.nbytes].copy_(as_bytes(tensor.contiguous()))

    def to_json(self) -> dict[str, Any]:
        """The record as `from_json` reads it."""
        parts = [
            {
                "name": part.name,
                "dtype": DTYPE_NAMES[part.dtype],
                "shape": list(part.shape),
                "offset": part.offset,
            }
            for part in self.parts
        ]
        return {"bytes": self.record_bytes, "parts": parts}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> RecordLayout:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        parts = tuple(
            Part(p["name"], DTYPES[p["dtype"]], tuple(map(int, p["shape"])), int(p["offset"]))
            for p in described["parts"]
        )
        return cls(parts, int(described["bytes"]))
