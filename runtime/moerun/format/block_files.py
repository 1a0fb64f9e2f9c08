"""From the bytes of blocks in a GGUF file to the codes and scales that a record holds.

ggml/src/ggml-common.h has the blocks (block_q4_0, block_q5_0, block_q8_0, block_q4_K, block_q5_K,
block_q6_K), dequantize_row_* in ggml/src/ggml-quants.c the order of their codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moerun.format.block_scheme import BlockScheme
from moerun.format.blocks import laid_out, split
from moerun.format.precision import Tensors

Split = tuple[torch.Tensor, torch.Tensor]  # codes [..., 32 or 256] and scales [..., scale_bytes]


def row_bytes(scheme: BlockScheme, columns: int) -> int:
    """Bytes of a row of so many columns in a file."""
    return columns // scheme.block * block_bytes(scheme)


def block_bytes(scheme: BlockScheme) -> int:
    """Bytes of one block in a file."""
    return scheme.block * scheme.bits // 8 + scheme.scale_bytes


def from_file(rows: torch.Tensor, scheme: BlockScheme) -> Tensors:
    """The record's tensors of one matrix, from its rows in a file, uint8[N, bytes of a row]."""
    blocks = rows.contiguous().view(len(rows), -1, block_bytes(scheme))
    codes, scales = _SPLIT[scheme.name](blocks)
    return laid_out(codes.reshape(len(rows), -1, scheme.group), scales.contiguous(), scheme)


def _nibbles(packed: torch.Tensor, at_once: int) -> torch.Tensor:
    """The low halves of so many bytes, then their high halves, and so on."""
    each = split(packed, -1, -1, 1, at_once)
    return torch.cat([each & 15, each >> 4], -2).flatten(-3)


def _bits(packed: torch.Tensor, at_once: int, bits: int) -> torch.Tensor:
    """The lowest ``bits`` of so many bytes, then the next ones, and so on."""
    each = split(packed, -1, -1, 1, at_once)
    places = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    return ((each >> places) & ((1 << bits) - 1)).flatten(-3)


def _q4_0(blocks: torch.Tensor) -> Split:
    return _nibbles(blocks[..., 2:], 16), blocks[..., :2]


def _q5_0(blocks: torch.Tensor) -> Split:
    places = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[..., 2:6, None] >> places & 1).flatten(-2)
    return _nibbles(blocks[..., 6:], 16) | fifth << 4, blocks[..., :2]


def _q8_0(blocks: torch.Tensor) -> Split:
    return blocks[..., 2:] ^ 128, blocks[..., :2]  # signed, and so 128 less


def _q4_k(blocks: torch.Tensor) -> Split:
    return _nibbles(blocks[..., 16:], 32), blocks[..., :16]


def _q5_k(blocks: torch.Tensor) -> Split:
    fifth = _bits(blocks[..., 16:48], 32, 1)
    return _nibbles(blocks[..., 48:], 32) | fifth << 4, blocks[..., :16]


def _q6_k(blocks: torch.Tensor) -> Split:
    high = _bits(blocks[..., 128:192], 32, 2)
    scales = torch.cat([blocks[..., 208:], blocks[..., 192:208]], -1)
    return _nibbles(blocks[..., :128], 64) | high << 4, scales


_SPLIT: dict[str, Callable[[torch.Tensor], Split]] = {
    "q4_0": _q4_0,
    "q5_0": _q5_0,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
