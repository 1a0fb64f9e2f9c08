"""Blocks of llama.cpp in records: their order there, quantising to them, and their values.

Weights are quantised to Q4_0 and Q8_0 alone, by the rule of ggml's reference
(`quantize_row_q4_0_ref`, `quantize_row_q8_0_ref` in ggml/src/ggml-quants.c). Values that were read
from such blocks come back as the same codes and scales, so a GGUF file of these types is packed
without loss. Of Q4_0 that holds for blocks with a code 0 in them, as that rule makes them;
llama.cpp's quantiser with an importance matrix makes some without, and for those the scale is
searched that gives the same values.
"""

from __future__ import annotations

import torch

from moerun.errors import RunError
from moerun.format.block_scheme import TILE_ROWS, BlockScheme, Scales
from moerun.format.layout import align_up
from moerun.format.precision import Tensors

_AT_ONCE_WEIGHTS = 1 << 22
_HALVES: dict[Scales, int] = {"half": 1, "pairs": 2, "bytes": 1}  # float16 scales of a block
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
        codes, scales = _quantise(block.view(len(block), -1, scheme.group), scheme)
        if not bool(torch.isfinite(scales).all()):
            raise RunError("its weights are too large to quantise: pack with bf16")
        first = start // TILE_ROWS
        some = slice(first, first + -(-len(block) // TILE_ROWS))
        each = laid_out(codes, scales.unsqueeze(-1).view(torch.uint8), scheme)
        for name, part in each.items():
            parts[name][some] = part
    return parts


def laid_out(codes: torch.Tensor, scales: torch.Tensor, scheme: BlockScheme) -> Tensors:
    """The tensors of ``scheme.parts`` from codes uint8[N, K / 32, 32] and the scales of each row,
    uint8[N, blocks, scale_bytes]."""
    pad = align_up(len(codes), TILE_ROWS) - len(codes)
    if pad:
        codes = torch.cat([codes, codes.new_full((pad, *codes.shape[1:]), scheme.zero)])
        scales = torch.cat([scales, scales.new_zeros(pad, *scales.shape[1:])])
    blocks = scales.shape[1]
    if scheme.scales == "half":
        rows = scales.view(torch.float16).view(-1, TILE_ROWS, blocks)
        return {"codes": _in_order(codes, scheme), "scales": rows.transpose(1, 2).contiguous()}
    # Each float16 of 16 rows, then each byte of them.
    n_halves = _HALVES[scheme.scales]
    tiles = scales.view(-1, TILE_ROWS, blocks, scheme.scale_bytes).transpose(1, 2)
    halves = split(tiles[..., : 2 * n_halves], -1, n_halves, 2).transpose(2, 3)
    each = tiles[..., 2 * n_halves :].transpose(2, 3)
    joined = torch.cat([halves.flatten(2), each.flatten(2)], -1)
    return {"codes": _in_order(codes, scheme), "scales": joined}


def dequantise_blocks(parts: Tensors, scheme: BlockScheme, rows: int) -> torch.Tensor:
    """The weights float32[rows, K] that the tensors of ``scheme.parts`` stand for."""
    codes = _codes_of(parts["codes"], scheme).float()
    scales, least = _scales_of(parts["scales"], scheme)
    if least is not None:
        values = split(codes, -1, 1, -1) * scales[..., None] - least[..., None]
    else:
        per_scale = split(codes, -1, scales.shape[-1], -1)
        values = (per_scale - scheme.zero) * scales[..., None]
    return values.flatten(1)[:rows]


def split(values: torch.Tensor, dimension: int, *sizes: int) -> torch.Tensor:
    """``values`` with one dimension divided into several."""
    divided: torch.Tensor = values.unflatten(dimension, sizes)  # type: ignore[no-untyped-call]
    return divided


def _codes_of(packed: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    """Codes uint8[N, K / 32, 32] of those that `_in_order` gives."""
    at_once, groups = packed.shape[:2]
    low_bytes = TILE_ROWS * scheme.group * min(scheme.bits, 4) // 8
    if scheme.bits == 8:
        fours = packed.view(at_once, groups, scheme.group // 4, TILE_ROWS, 4)
    else:
        low = split(packed[..., :low_bytes], -1, -1, TILE_ROWS, 4)
        fours = torch.cat([low & 15, low >> 4], 2)
    if (bits := scheme.high_bits) > 0:
        high = split(packed[..., low_bytes:], -1, -1, 1, TILE_ROWS, 4)
        places = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1, 1)
        fours = fours | ((high >> places) & ((1 << bits) - 1)).flatten(2, 3) << 4
    return fours.permute(0, 3, 1, 2, 4).reshape(at_once * TILE_ROWS, groups, scheme.group)


def _scales_of(
    scales: torch.Tensor, scheme: BlockScheme
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32[N, K / 32, a group's], and what is taken off where groups have a least
    weight."""
    at_once, blocks = scales.shape[:2]
    if scheme.scales == "half":
        return scales.transpose(1, 2).reshape(-1, blocks, 1).float(), None
    n_halves = _HALVES[scheme.scales]
    end = 2 * TILE_ROWS * n_halves
    halves = scales[..., :end].contiguous().view(torch.float16).float()
    halves = split(halves, -1, n_halves, 1, TILE_ROWS)
    each = split(scales[..., end:], -1, -1, TILE_ROWS)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        groups = values.permute(0, 3, 1, 2).reshape(at_once * TILE_ROWS, -1, scheme.sums_a_group)
        return groups.contiguous()

    if scheme.scales == "bytes":
        return by_row(each.view(torch.int8) * halves[:, :, 0]), None
    low, middle, high = each[:, :, :4], each[:, :, 4:8], each[:, :, 8:]
    steps = torch.cat([low & 63, high & 15 | low >> 6 << 4], 2)
    offsets = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], 2)
    return by_row(steps * halves[:, :, 0]), by_row(offsets * halves[:, :, 1])


def _in_order(codes: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    """Codes uint8[N, groups, 32] as the kernel reads them: of 16 rows and 4 columns at a time, of
    less than 8 bits with those 16 columns further in the high halves. Fifth and sixth bits follow,
    those of several such fours in one byte."""
    rows, groups, group = codes.shape
    fours = codes.view(rows // TILE_ROWS, TILE_ROWS, groups, group // 4, 4)
    fours = fours.permute(0, 2, 3, 1, 4)
    if scheme.bits == 8:
        return fours.reshape(rows // TILE_ROWS, groups, -1)
    low, upper = (fours & 15).chunk(2, dim=2)
    packed = [(low | upper << 4).flatten(2)]
    if (bits := scheme.high_bits) > 0:
        high = split(fours >> 4, 2, -1, 8 // bits)
        places = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1, 1)
        packed.append((high << places).sum(3, dtype=torch.uint8).flatten(2))
    return torch.cat(packed, -1)


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
