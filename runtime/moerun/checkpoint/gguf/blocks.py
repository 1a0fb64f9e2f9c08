"""The blocks that GGUF keeps weights in: sizes by ggml type, and the values in them.

transformers' torch code reads the types that it knows; the package gguf, by llama.cpp's authors,
reads the others (Q5_0, Q5_1, MXFP4, TQ1_0, TQ2_0 and newer ones). Both give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from moerun.errors import RunError
from moerun.format.coding import Coding

# Types that hold values, not blocks of codes, by their number in ggml.h.
PLAIN: dict[int, torch.dtype] = {
    **{0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64},
    **{24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64},
}
MXFP4 = 39  # its number there
MXFP4_CODING = Coding("e2m1", "e8m0", (1, 32))
_MXFP4_BYTES = 17  # of a block of 32: the exponent, and 16 bytes of codes


def mxfp4_parts(raw: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes [rows, columns] and exponents [rows, columns / 32] in MXFP4 blocks, uint8 all.

    The low halves of a block's bytes are its first 16 codes. ggml's values are twice those of E2M1,
    and its scale half of what the exponent says.
    """
    blocks = raw.view(-1, columns // 32, _MXFP4_BYTES)
    codes = blocks[..., 1:]
    return torch.cat([codes & 15, codes >> 4], -1).flatten(-2), blocks[..., 0]


@cache
def _sizes() -> dict[int, tuple[str, int, int]]:
    """Name, weights a block and bytes a block of every type that the package gguf knows."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise RunError(
            "reading GGUF needs the package gguf, which is not installed: "
            "pip install 'moe-offload-lab[run]'"
        ) from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def block_of(ggml_type: int) -> tuple[int, int] | None:
    """Weights and bytes of a block of this type; None for an unknown type."""
    if (dtype := PLAIN.get(ggml_type)) is not None:
        return 1, dtype.itemsize
    known = _sizes().get(ggml_type)
    return None if known is None else known[1:]


def type_name(ggml_type: int) -> str:
    """The type as llama.cpp writes it, such as Q4_K."""
    return _sizes()[ggml_type][0]


def values_of(raw: torch.Tensor, ggml_type: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of ``shape`` in the bytes ``raw`` (uint8): blocks as float32, values as they are.

    Raises NotImplementedError for a type that neither library can read.
    """
    if (dtype := PLAIN.get(ggml_type)) is not None:
        return raw.view(dtype).reshape(shape)
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

    if ggml_type in GGML_BLOCK:
        values: torch.Tensor = dequantize(raw, ggml_type)
        return values.reshape(shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as by_gguf

    _, _, block_bytes = _sizes()[ggml_type]
    blocks = raw.numpy().reshape(-1, block_bytes)
    return torch.from_numpy(by_gguf(blocks, GGMLQuantizationType(ggml_type))).reshape(shape)


def check_readable(types: Mapping[int, str], path: Path) -> None:
    """RunError where neither library reads one of the types; each with a tensor that has it."""
    for ggml_type, tensor in types.items():
        elements, block_bytes = block_of(ggml_type) or (0, 0)
        try:
            values_of(torch.zeros(block_bytes, dtype=torch.uint8), ggml_type, (elements,))
        except NotImplementedError as error:
            raise RunError(
                f"{path}: tensor {tensor!r} is of ggml type {type_name(ggml_type)}, which cannot "
                "be read: update the package gguf (pip install -U gguf), or give a file of another "
                "type"
            ) from error
