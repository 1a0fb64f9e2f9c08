"""Quantised matrices times the many tokens of a prompt, on the CPU: dequantised block by block.

torch's int4 kernel keeps weights packed and multiplies in float32, which is best for a few tokens.
For many it pays to bring a block of rows to bfloat16, once for all tokens, and to multiply it with
the processor's own bfloat16 instructions while it lies in the cache.
"""

from __future__ import annotations

import torch

from moerun.format.layout import align_up
from moerun.format.precision import ROWS, Scheme

# Measured on one core with AVX512_BF16 at Mixtral's shapes: benchmarks/expert_tokens.py. With
# groups smaller than the kernel's, that goes over the matrix twice, and this way pays sooner.
_PAYS_FROM_TOKENS = {1: 64, 2: 28}
_BLOCK_WEIGHTS = 1 << 20  # with less, calls take as long as their work; with more, the cache ends
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
_HIGH_HALF = -(1 << 16)


def pays_from_tokens(scheme: Scheme) -> int | None:
    """The least tokens for which this beats the int4 kernel; None where this CPU would need to
    have AVX512_BF16, without which products of bfloat16 are slower than the kernel's."""
    return _PAYS_FROM_TOKENS[scheme.passes] if torch.cpu._is_avx512_bf16_supported() else None


def scratch_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """What `multiply_blockwise` holds besides its arguments and its result, at most."""
    weights = _blocks_at_once(columns, align_up(rows, ROWS) // ROWS) * ROWS * columns
    # Codes as bytes, in float32 and in bfloat16 (which the product lays out once more for itself);
    # scales and terms in float32.
    return weights // 2 + weights * (4 + 2 + 2) + weights // scheme.group * 3 * 4


def multiply_blockwise(
    x: torch.Tensor, nibbles: torch.Tensor, terms: torch.Tensor, group: int
) -> torch.Tensor:
    """x[T, K] in bfloat16 through nibbles, uint8[N * K / 2] ordered as by `bitplanes`, with the
    scales and terms of `expand_scales`, bfloat16[passes, K / group / passes, N, 2]: [T, N] in
    bfloat16. A weight is rounded to bfloat16 once.
    """
    columns = x.shape[1]
    blocks = nibbles.view(torch.int64).view(-1, columns, ROWS // 16)
    passes, groups, rows, _ = terms.shape
    # A scale and its term are the two halves of one word: shifts part them, as float32.
    pairs = terms.view(torch.int32).view(passes, groups, -1, ROWS).permute(2, 1, 0, 3)[..., None, :]
    at_once = _blocks_at_once(columns, len(blocks))
    halves = torch.empty_like(blocks[:at_once])
    codes = torch.empty(at_once, columns, ROWS)
    weights = torch.empty_like(codes, dtype=torch.bfloat16)
    y = x.new_empty(len(x), rows)
    for first in range(0, len(blocks), at_once):
        some = slice(first, first + at_once)
        n = len(blocks[some])
        _dequantise(blocks[some], pairs[some], group, halves[:n], codes[:n])
        weights[:n].copy_(codes[:n])
        for number, weight in enumerate(weights[:n], first):
            torch.mm(x, weight, out=y[:, number * ROWS : (number + 1) * ROWS])
    return y


def _blocks_at_once(columns: int, n_blocks: int) -> int:
    return min(max(1, _BLOCK_WEIGHTS // (ROWS * columns)), n_blocks)


def _dequantise(
    blocks: torch.Tensor, pairs: torch.Tensor, group: int, halves: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the weights float32[n, K, 64] of nibbles int64[n, K, 4] with the scales and terms
    int32[n, groups, passes, 1, 64]. A byte of a column holds the rows r and r + 32."""
    scales = (pairs << 16).view(torch.float32)
    terms = (pairs & _HIGH_HALF).view(torch.float32).sub_(scales, alpha=8)
    half = halves.view(torch.uint8)
    torch.bitwise_and(blocks, _LOW_NIBBLES, out=halves)
    out[..., : ROWS // 2].copy_(half)
    torch.bitwise_right_shift(blocks, 4, out=halves)
    halves.bitwise_and_(_LOW_NIBBLES)
    out[..., ROWS // 2 :].copy_(half)
    grouped = out.view(*scales.shape[:3], group, ROWS)
    torch.addcmul(terms, grouped, scales, out=grouped)
