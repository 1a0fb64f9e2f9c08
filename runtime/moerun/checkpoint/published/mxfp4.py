"""MXFP4 as gpt-oss is published in: fused experts in blocks of 32 values, with E8M0 exponents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moerun.checkpoint.published.blocks import unpack_nibbles
from moerun.checkpoint.published.reader import Coded, Headers, MisfitError
from moerun.format.coding import Coding
from moerun.format.precision import Tensors

MX_BLOCK = 32  # values that share an exponent, in 16 bytes


class FusedMxfp4:
    """Blocks uint8[..., N, K / 32, 16] and scales uint8[..., N, K / 32] of a weight [..., K, N]."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        pass

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """The model multiplies from the right: the weight lies the other way round."""
        blocks, scales = headers["blocks"].shape, headers["scales"].shape
        if len(blocks) not in (3, 4) or blocks[-1] != MX_BLOCK // 2 or blocks[:-1] != scales:
            raise MisfitError(f"blocks {list(blocks)} do not fit scales {list(scales)}")
        *experts, rows, groups, _ = blocks
        return (*experts, groups * MX_BLOCK, rows)

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """By transformers' own function."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        made: torch.Tensor = convert_moe_packed_tensors(
            parts["blocks"][None], parts["scales"][None], dtype=dtype
        )
        return made[0]

    def coding(self, headers: Headers) -> Coding | None:
        """Exponents of 32 rows of a column, as the weight lies."""
        return Coding("e2m1", "e8m0", (MX_BLOCK, 1))

    def coded(self, parts: Tensors) -> Coded:
        """The codes and exponents, turned as the weight is."""
        elements = unpack_nibbles(parts["blocks"]).flatten(-2)
        turned = {"codes": elements.T, "scales": parts["scales"].T}
        return Coded(Coding("e2m1", "e8m0", (MX_BLOCK, 1)), turned)
