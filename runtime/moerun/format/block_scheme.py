"""The blocks in which llama.cpp keeps weights, as records hold them: a scheme for each type.

ggml/src/ggml-common.h has the blocks of a GGUF file, ggml/src/ggml-quants.c what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moerun.errors import RunError
from moerun.format.layout import PartSpec, align_up

TILE_ROWS = 16  # rows that the kernel multiplies at once

Scales = Literal["half", "pairs", "bytes"]
_SCALE_BYTES: dict[Scales, int] = {"half": 2, "pairs": 2 + 2 + 12, "bytes": 2 + 16}


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """Blocks of llama.cpp: each weight is a code of a few bits, and weights share scales.

    A record holds the same codes and scales as a GGUF file of the type, in as many bits, in the
    order in which `moerun.kernels.blocks_cpu` multiplies 16 rows at once.

    name    of the type, as GGUF has it, in small letters
    bits    of a code
    zero    the code of a weight of 0; 1 where groups have a least weight instead
    block   weights of a row that one block of the file has
    scales  half: a float16 for each 32 weights, weight = (code - zero) x scale;
            pairs: two float16 a block, and 6 bits of each for every 32 weights (in 12 bytes),
            weight = code x scale - least;
            bytes: a float16 a block and a signed byte of it for every 16 weights,
            weight = (code - zero) x scale
    """

    name: str
    bits: int
    zero: int
    block: int = 32
    scales: Scales = "half"

    @property
    def group(self) -> int:
        """Weights of a row that are multiplied by activations of one scale."""
        return 32

    @property
    def high_bits(self) -> int:
        """Bits of a code that lie apart from its low four."""
        return 0 if self.bits == 8 else self.bits - 4

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row's block."""
        return _SCALE_BYTES[self.scales]

    @property
    def sums_a_group(self) -> int:
        """Sums of a group's activations that a product needs: one for each of its scales."""
        return 2 if self.scales == "bytes" else 1

    def check(self, name: str, columns: int) -> None:
        """Raises RunError when a matrix of so many input columns does not divide into blocks."""
        if columns % self.block:
            raise RunError(
                f"{name} has {columns} input columns, which {self.name} cannot divide into blocks "
                f"of {self.block}: pack with another precision"
            )

    def fits(self, shape: tuple[int, ...], *, transposed: bool = False) -> bool:
        """Whether a matrix of this shape can be kept so."""
        return not transposed and shape[1] % self.block == 0

    def parts(self, rows: int, columns: int) -> list[PartSpec]:
        """The tensors of one packed matrix [rows, columns]: name, dtype, shape."""
        at_once, blocks = align_up(rows, TILE_ROWS) // TILE_ROWS, columns // self.block
        code_bytes = TILE_ROWS * self.group * self.bits // 8
        scales: PartSpec = ("scales", torch.uint8, (at_once, blocks, TILE_ROWS * self.scale_bytes))
        if self.scales == "half":
            scales = ("scales", torch.float16, (at_once, blocks, TILE_ROWS))
        return [("codes", torch.uint8, (at_once, columns // self.group, code_bytes)), scales]

    def to_json(self) -> dict[str, Any]:
        """The scheme as `from_json` reads it."""
        return {"blocks": self.name}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> BlockScheme:
        """Raises KeyError for blocks that this version does not know."""
        return BLOCK_SCHEMES[described["blocks"]]


BLOCK_SCHEMES = {
    scheme.name: scheme
    for scheme in (
        BlockScheme("q4_0", bits=4, zero=8),
        BlockScheme("q5_0", bits=5, zero=16),
        BlockScheme("q8_0", bits=8, zero=128),
        BlockScheme("q4_k", bits=4, zero=1, block=256, scales="pairs"),
        BlockScheme("q5_k", bits=5, zero=1, block=256, scales="pairs"),
        BlockScheme("q6_k", bits=6, zero=32, block=256, scales="bytes"),
    )
}
