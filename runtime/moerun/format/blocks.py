"""Quantising to llama.cpp's blocks Q4_0 and Q8_0, and their values.

The rule is that of ggml's reference (`quantize_row_q4_0_ref`, `quantize_row_q8_0_ref` in
ggml/src/ggml-quants.c). Values that were read from such blocks come back as the same codes and
scales, so a GGUF file of these types is packed without loss. Of Q4_0 that holds for blocks with a
code 0 in them, as that rule makes them; llama.cpp's quantiser with an importance matrix makes some
without, and for those the scale is searched that gives the same values.
"""

from __future__ import annotations

import torch

from moerun.errors import RunError
from moerun.format.layout import align_up
from moerun.format.precision import TILE_ROWS, BlockScheme, Tensors

_AT_ONCE_WEIGHTS = 1 << 22
# Extremes of a Q4_0 block as multiples of its scale: code 0 is -8, code 15 is 7.
_EXTREMES = (-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1)


def quantise_blocks(weight: torch.Tensor, scheme: BlockScheme) -> dict[str, torch.Tensor]:
    """Quantise weight[N, K] into the tensors of ``scheme.parts(N, K)``, on the CPU.

    Raises RunError when weights are not finite, or K does not divide into blocks.
    """
    rows, columns = weight.shape
    scheme.check("a matrix", columns)
    step = max(TILE_ROWS, _AT_ONCE_WEIGHTS // columns // TILE_ROWS * TILE_ROWS)
    parts = {
        name: torch.empty(shape, dtype=dtype) for name, dtype, shape in scheme.parts(rows, columns)
    }
    for start in range(0, rows, step):
        block = weight[start : start + step].to("cpu", torch.float32)
        if not bool(torch.isfinite(block).all()):
            raise RunError("it has weights that are not finite")
        pad = align_up(len(block), TILE_ROWS) - len(block)
        block = torch.cat([block, block.new_zeros(pad, columns)]) if pad else block
        codes, scales = _quantise(block.view(len(block), -1, scheme.group), scheme)
        if not bool(torch.isfinite(scales).all()):
            raise RunError("its weights are too large to quantise: pack with bf16")
        first = start // TILE_ROWS
        some = slice(first, first + len(block) // TILE_ROWS)
        parts["codes"][some] = _in_order(codes, scheme)
        parts["scales"][some] = scales.view(-1, TILE_ROWS, scales.shape[1]).transpose(1, 2)
    return parts


def dequantise_blocks(parts: Tensors, scheme: BlockScheme, rows: int) -> torch.Tensor:
    """The weights float32[rows, K] of the tensors that `quantise_blocks` gives."""
    packed, scales = parts["codes"], parts["scales"]
    at_once, blocks = packed.shape[:2]
    if scheme.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], 2)
    codes = packed.view(at_once, blocks, scheme.group // 4, TILE_ROWS, 4)
    codes = codes.permute(0, 3, 1, 2, 4).reshape(at_once * TILE_ROWS, blocks, scheme.group)
    spread = scales.transpose(1, 2).reshape(at_once * TILE_ROWS, blocks, 1).float()
    return ((codes.float() - scheme.zero) * spread).flatten(1)[:rows]


def _in_order(codes: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    """Codes uint8[N, blocks, 32] as the kernel reads them: of 16 rows and 4 columns at a time, in
    Q4_0 with those 16 columns further in the high halves."""
    rows, blocks, group = codes.shape
    fours = codes.view(rows // TILE_ROWS, TILE_ROWS, blocks, group // 4, 4)
    fours = fours.permute(0, 2, 3, 1, 4)
    if scheme.bits == 4:
        low, high = fours.chunk(2, dim=2)
        fours = low | high << 4
    return fours.reshape(rows // TILE_ROWS, blocks, -1)


def _quantise(weights: torch.Tensor, scheme: BlockScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8[N, blocks, 32] and scales float16[N, blocks] of float32[N, blocks, 32]."""
    if scheme.bits == 8:
        scales = weights.abs().amax(-1) / 127
        return _codes(weights, scales, scheme), scales.half()
    extreme = weights.gather(-1, weights.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = extreme / _EXTREMES[0]
    codes = _codes(weights, scales, scheme)
    off = _values(codes, scales, scheme).ne(weights).any(-1)
    if bool(off.any()):
        _search(weights, extreme, off, codes, scales, scheme)
    return codes, scales.half()


def _codes(weights: torch.Tensor, scales: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    inverse = torch.where(scales == 0, 0, 1 / scales)[..., None]
    if scheme.bits == 8:  # rounded half away from zero, as C's roundf
        scaled = weights * inverse
        rounded = torch.trunc(scaled + torch.copysign(scaled.new_tensor(0.5), scaled))
        return (rounded + scheme.zero).to(torch.uint8)
    return torch.trunc(weights * inverse + (scheme.zero + 0.5)).clamp_(max=15).to(torch.uint8)


def _values(codes: torch.Tensor, scales: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    return (codes.float() - scheme.zero) * scales.half().float()[..., None]


def _search(
    weights: torch.Tensor,
    extreme: torch.Tensor,
    off: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scheme: BlockScheme,
) -> None:
    """Give the blocks ``off`` a scale that reproduces them exactly, where there is one."""
    left = off.nonzero(as_tuple=True)
    for multiple in _EXTREMES[1:]:
        if not len(left[0]):
            return
        tried = extreme[left] / multiple
        some = tried.half().float().eq(tried)  # a scale of a file is: few others are
        at, tried = tuple(index[some] for index in left), tried[some]
        found = _codes(weights[at], tried, scheme)
        exact = _values(found, tried, scheme).eq(weights[at]).all(-1)
        mended = tuple(index[exact] for index in at)
        codes[mended], scales[mended] = found[exact], tried[exact]
        some[some.clone()] = exact
        left = tuple(index[~some] for index in left)
