"""FP8, INT8 and FP4 weights with scales of a tensor, of rows or of blocks, in float or E8M0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from moerun.checkpoint.published.reader import Coded, Header, Headers, MisfitError
from moerun.errors import RunError
from moerun.format.coding import AT_ONCE_WEIGHTS, Coding, finer
from moerun.format.precision import Tensors

USUAL_BLOCK = (128, 128)  # DeepSeek-V3's, where a checkpoint does not say
WIDEST_BLOCK = 1 << 20
_FP4 = (torch.int8, torch.uint8)  # two values a byte
_E8M0 = (torch.float8_e8m0fnu, torch.uint8)


class BlockScaled:
    """Weight = value x scale of its block. The product is transformers' own (`Fp8Dequantize`)."""

    int8_is_fp4 = True

    def __init__(self, described: Mapping[str, Any]) -> None:
        declared = described.get("weight_block_size")
        self._declared = USUAL_BLOCK
        if isinstance(declared, list) and len(declared) == 2:
            for size in declared:
                if type(size) is not int or not 0 < size <= WIDEST_BLOCK:
                    raise RunError(
                        f"quantization_config cannot be used: weight_block_size is {declared}, not "
                        f"two whole numbers from 1 to {WIDEST_BLOCK:,}"
                    )
            self._declared = (declared[0], declared[1])

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """The shape of the codes, or twice as wide; scales must divide it into blocks."""
        shape = self._shape(headers)
        self._block(shape[-2:], headers["scale"].shape[len(shape) - 2 :])
        return shape

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """Rows of blocks at a time, so that little is held in float32."""
        codes, scales = parts["codes"], _float32(parts["scale"])
        rows, columns = self._matrix(parts)
        block = self._block((rows, columns), tuple(scales.shape))
        grid = scales.reshape(-(-rows // block[0]), -(-columns // block[1]))
        weight = torch.empty(rows, columns, dtype=dtype)
        lines = max(1, AT_ONCE_WEIGHTS // (block[0] * columns))
        for first in range(0, len(grid), lines):
            some = slice(first * block[0], (first + lines) * block[0])
            weight[some] = self._multiply(codes[some], grid[first : first + lines], block)
        return weight

    def _multiply(
        self, codes: torch.Tensor, grid: torch.Tensor, block: tuple[int, int]
    ) -> torch.Tensor:
        """Codes times the scales of their blocks, float32. Blocks that are cut off at the end are
        filled up for transformers, which divides a weight evenly by the number of its scales."""
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        rows, columns = self._shape({"codes": Header.of(codes)})
        per_byte = columns // codes.shape[1]
        if codes.dtype in _FP4:
            codes = codes.view(torch.int8) if self.int8_is_fp4 else codes.to(torch.int16)
        more_rows = grid.shape[0] * block[0] - rows
        more_columns = (grid.shape[1] * block[1] - columns) // per_byte
        if more_rows or more_columns:
            plain = codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes
            codes = F.pad(plain, (0, more_columns, 0, more_rows)).view(codes.dtype)
        made = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": grid})["weight"]
        weight: torch.Tensor = made[:rows, :columns]
        return weight

    def coding(self, headers: Headers) -> Coding | None:
        """E4M3 and FP4 values are kept, with scales of blocks that divide the weight."""
        codes, scale = headers["codes"], headers["scale"]
        fp4 = codes.dtype in _FP4 and self.int8_is_fp4
        if not fp4 and codes.dtype != torch.float8_e4m3fn:
            return None
        shape = self._shape(headers)
        rows, columns = shape[-2:]
        block = self._block((rows, columns), scale.shape[len(shape) - 2 :])
        return Coding(
            "e2m1" if fp4 else "e4m3",
            "e8m0" if scale.dtype in _E8M0 else "float32",
            (finer(block[0], rows), finer(block[1], columns)),
        )

    def coded(self, parts: Tensors) -> Coded:
        """The codes as they are; the scales of blocks that are cut off are repeated."""
        coding = self.coding({role: Header.of(part) for role, part in parts.items()})
        assert coding is not None
        rows, columns = self._matrix(parts)
        block = self._block((rows, columns), tuple(parts["scale"].shape))
        scales = parts["scale"]
        scales = scales.view(torch.uint8) if coding.scale == "e8m0" else scales.float()
        scales = scales.reshape(-(-rows // block[0]), -(-columns // block[1]))
        for dimension, size in enumerate((rows, columns)):
            times = block[dimension] // coding.block[dimension]
            scales = scales.repeat_interleave(times, dimension)
            scales = scales.narrow(dimension, 0, size // coding.block[dimension])
        codes = parts["codes"].view(torch.uint8)
        if coding.elements == "e2m1":
            codes = unpack_nibbles(codes)
        return Coded(coding, {"codes": codes, "scales": scales})

    def _shape(self, headers: Headers) -> tuple[int, ...]:
        codes = headers["codes"]
        if len(codes.shape) not in (2, 3):
            raise MisfitError(f"a quantised weight has shape {list(codes.shape)}")
        wide = 2 if codes.dtype in _FP4 and self.int8_is_fp4 else 1
        return (*codes.shape[:-1], codes.shape[-1] * wide)

    def _matrix(self, parts: Tensors) -> tuple[int, int]:
        rows, columns = self._shape({"codes": Header.of(parts["codes"])})
        return rows, columns

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape
        if math.prod(scales) == 1:
            return rows, columns
        grid = (*scales, 1) if len(scales) == 1 else scales
        if len(grid) == 2:
            even = rows // grid[0], columns // grid[1]
            divides = even[0] * grid[0] == rows and even[1] * grid[1] == columns
            for block in (self._declared, USUAL_BLOCK, *([even] if divides else [])):
                if (-(-rows // block[0]), -(-columns // block[1])) == grid:
                    return block
        raise MisfitError(
            f"scales {list(scales)} do not fit a weight {list(shape)} in blocks of "
            f"{' x '.join(map(str, self._declared))}"
        )


class RowScaled(BlockScaled):
    """The same where bytes are integers: compressed-tensors' int-quantized."""

    int8_is_fp4 = False


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the first in the low half: uint8[..., n] to uint8[..., 2 n]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _float32(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32. Bytes are exponents, as OCP's E8M0 has them."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()
