"""Precisions: what "4bit", "2bit", "q4_0" and the others mean, and which plain ones there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moerun.errors import RunError
from moerun.format.block_scheme import BLOCK_SCHEMES, BlockScheme
from moerun.format.layout import PartSpec, align_up
from moerun.format.names import BLOCKS, NATIVE, PRECISIONS, Precisions, check_precision

__all__ = [
    "BLOCK_SCHEMES",
    "NATIVE",
    "PACKED_SCHEMES",
    "PLAIN",
    "PRECISIONS",
    "SCHEMES",
    "BlockScheme",
    "PartSpec",
    "Precisions",
    "Scheme",
    "check_precision",
    "scheme_of",
]

ROWS = 64  # rows of one block of the nibble order
META_GROUP = 128  # scales (and zeros) that share one range, at 8 bits
KERNEL_GROUP = 32  # the smallest group torch's int4 kernel knows

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits of a weight and weights of a group; scales and zeros are 8-bit in groups of 128.

    `lift` is added to a code in its nibble: it centres the codes so that the kernel's rounded
    zero term stays small.
    """

    name: str
    bits: int
    group: int
    lift: int

    @property
    def passes(self) -> int:
        """Multiplies per matrix: groups below the kernel's smallest take turns."""
        return max(1, KERNEL_GROUP // self.group)

    def check(self, name: str, columns: int) -> None:
        """Raises RunError when a matrix of so many input columns does not divide into groups."""
        unit = max(self.group, KERNEL_GROUP)
        if columns % unit:
            raise RunError(
                f"{name} has {columns} input columns, which {self.name} cannot divide into groups "
                f"of {unit}: pack with another precision"
            )

    def parts(self, rows: int, columns: int) -> list[PartSpec]:
        """The tensors of one packed matrix [rows, columns]: name, dtype, shape."""
        padded = align_up(rows, ROWS)
        weights = padded * columns
        metas = align_up(padded * columns // self.group, META_GROUP)
        low_bits = 4 if self.bits == 4 else 2
        codes: list[PartSpec] = [("codes", torch.uint8, (weights * low_bits // 8,))]
        if self.bits == 3:
            codes.append(("high", torch.uint8, (weights // 8,)))
        return [
            *codes,
            ("scales", torch.uint8, (metas,)),
            ("zeros", torch.uint8, (metas,)),
            # step and least value of the scales, then of the zeros
            ("ranges", torch.float16, (4, metas // META_GROUP)),
        ]


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("4bit", bits=4, group=64, lift=0),
        Scheme("3bit", bits=3, group=64, lift=4),
        Scheme("2bit", bits=2, group=16, lift=6),
    )
}


PACKED_SCHEMES: dict[str, Scheme | BlockScheme] = {
    **SCHEMES,
    **{name: BLOCK_SCHEMES[name] for name in BLOCKS},
}

PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def scheme_of(precision: str) -> Scheme | BlockScheme | None:
    """The quantisation of a precision, None for a plain one. Raises RunError for an unknown one."""
    check_precision(precision)
    return PACKED_SCHEMES.get(precision)
