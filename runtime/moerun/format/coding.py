"""Matrices kept in the bits in which they were published: FP8 and FP4 values with scales of blocks.

A record holds the codes in the order of the matrix that the model multiplies by, and one scale for
each block. FP4 is the OCP Microscaling Formats' (MX) v1.0: 4-bit E2M1 values, two to a byte, the
first in the low half, and a power of two for each 32 of them, an E8M0 byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moerun.format.block_scheme import BlockScheme
from moerun.format.precision import PartSpec, Tensors

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
"""What each E2M1 code stands for."""

ELEMENTS = ("e4m3", "e2m1")
SCALES = {"float32": torch.float32, "e8m0": torch.uint8}
AT_ONCE_WEIGHTS = 1 << 22  # that `decode` holds in float32 at once


@dataclass(frozen=True, slots=True)
class Coding:
    """How a matrix is coded: weight[r, c] = value of its code x the scale of its block.

    elements  e4m3 (8 bits) or e2m1 (4 bits)
    scale     float32, or e8m0: a byte b stands for 2^(b - 127)
    block     rows and columns that share a scale, in the matrix as it is stored
    """

    elements: str
    scale: str
    block: tuple[int, int]

    @property
    def name(self) -> str:
        """What traces and reports call it: fp8, or mxfp4."""
        return "fp8" if self.elements == "e4m3" else "mxfp4"

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix; blocks at its end may be cut off."""
        rows, columns = shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    def fits(self, shape: tuple[int, ...], *, transposed: bool = False) -> bool:
        """Whether a matrix of this shape can be kept so."""
        return self.elements == "e4m3" or shape[1] % 2 == 0

    def parts(self, rows: int, columns: int) -> list[PartSpec]:
        """The tensors of one matrix [rows, columns]: name, dtype, shape."""
        width = columns if self.elements == "e4m3" else columns // 2
        return [
            ("codes", torch.uint8, (rows, width)),
            ("scales", SCALES[self.scale], self.grid((rows, columns))),
        ]

    def to_json(self) -> dict[str, Any]:
        """The coding as `from_json` reads it."""
        return {"elements": self.elements, "scale": self.scale, "block": list(self.block)}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Coding:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        rows, columns = (int(size) for size in described["block"])
        coding = cls(str(described["elements"]), str(described["scale"]), (rows, columns))
        if coding.elements not in ELEMENTS or coding.scale not in SCALES or min(coding.block) < 1:
            raise ValueError(f"{described} is no coding")
        return coding


Kept = Coding | BlockScheme
"""How a matrix is kept in the bits of its publication. A `Coding` is dequantised whenever it is
multiplied; blocks are multiplied as they are."""


def kept_from_json(described: Mapping[str, Any]) -> Kept:
    """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
    return (
        BlockScheme.from_json(described) if "blocks" in described else Coding.from_json(described)
    )


def pack_elements(elements: torch.Tensor, coding: Coding) -> torch.Tensor:
    """The stored codes of one code a weight, uint8[rows, columns]."""
    if coding.elements == "e4m3":
        return elements.contiguous()
    return elements[:, 0::2] | elements[:, 1::2] << 4


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32, on their device: as they are, or 2^(byte - 127), of which 255 is NaN."""
    if scales.dtype == torch.uint8:
        return scales.view(torch.float8_e8m0fnu).float()
    return scales


def decode(parts: Tensors, coding: Coding, out: torch.Tensor) -> torch.Tensor:
    """Write the weights of ``parts`` to ``out`` [rows, columns], on whatever device they lie.

    Values times scales in float32, rounded once: as transformers' Fp8Dequantize and
    Mxfp4Dequantize. The CPU has a faster way, `moerun.kernels.coded`.
    """
    rows, columns = out.shape
    block_rows, block_columns = coding.block
    scales = scale_values(parts["scales"])
    step = max(1, AT_ONCE_WEIGHTS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        lines = torch.arange(start, stop, device=out.device) // block_rows
        spread = scales[lines].repeat_interleave(block_columns, 1)[:, :columns]
        out[start:stop].copy_(_values(parts["codes"][start:stop], coding).mul_(spread))
    return out


def _values(codes: torch.Tensor, coding: Coding) -> torch.Tensor:
    """The values of stored codes, float32[rows, columns]."""
    if coding.elements == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    table = torch.tensor(FP4_VALUES, device=codes.device)
    return table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]


def finer(block: int, size: int) -> int:
    """The greatest length of blocks that divides both a block and a dimension of ``size``: with it,
    matrices can be joined along that dimension."""
    return math.gcd(block, size)
