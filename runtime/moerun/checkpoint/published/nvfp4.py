"""NVFP4 as NVIDIA's ModelOpt writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moerun.checkpoint.published.blocks import unpack_nibbles
from moerun.checkpoint.published.reader import Dequantising, Headers, MisfitError
from moerun.format.coding import FP4_VALUES
from moerun.format.precision import Tensors

GROUP = 16  # values that share a scale of 8 bits


class ModelOptNvfp4(Dequantising):
    """Two values a byte, uint8[N, K / 2], E4M3 scales [N, K / 16], one float32 for the whole
    weight: value x (scale x scale of the weight). No public function dequantises it on a CPU;
    compressed-tensors' NVFP4, which has the reciprocal of the weight's scale, is equal but for
    the rounding of that reciprocal."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        pass

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """[..., N, K]."""
        codes, scale = headers["codes"].shape, headers["scale"].shape
        shape = (*codes[:-1], codes[-1] * 2)
        if scale != (*shape[:-1], shape[-1] // GROUP) or shape[-1] % GROUP:
            raise MisfitError(
                f"scales {list(scale)} do not fit a weight {list(shape)} in groups of {GROUP}"
            )
        return shape

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """In float32, rounded once."""
        values = torch.tensor(FP4_VALUES)[unpack_nibbles(parts["codes"]).int()]
        scales = parts["scale"].float() * parts["tensor_scale"].float().reshape(())
        return (values * scales.repeat_interleave(GROUP, -1)).to(dtype)
