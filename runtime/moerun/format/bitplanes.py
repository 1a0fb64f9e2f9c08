"""The packed form of a quantised matrix: bit planes of codes, 8-bit scales and zeros.

Codes are nibbles in the order that torch's int4 kernel for AVX-512 reads, so that 4-bit experts
are computed from their record as it lies; 3- and 2-bit codes are split into bit planes that
become such nibbles by shifts and masks over whole words, at memory speed.
"""

from __future__ import annotations

import torch

from moerun.format.layout import align_up
from moerun.format.precision import META_GROUP, ROWS, Scheme, Tensors

# Scales are kept times this, so that their 16-bit ranges stay clear of subnormal numbers.
SCALE_UNIT = 2.0**10
_BLOCK_BYTES = 1 << 17  # expansion works in blocks that fit a core's cache


def pack_codes(codes: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Pack codes uint8[N, K], N a multiple of 64, into planes."""
    rows, columns = codes.shape
    # [block, quarter, row, column] -> per block and column: 16 bytes of rows 0-15 | 32-47 << 4,
    # then 16 of rows 16-31 | 48-63 << 4
    blocks = codes.view(rows // ROWS, 4, 16, columns).transpose(2, 3)
    nibbles = (blocks[:, :2] | blocks[:, 2:] << 4).permute(0, 2, 1, 3).reshape(-1)
    if scheme.bits == 4:
        return {"codes": nibbles}
    first, second = (nibbles & 0x33).chunk(2)
    packed = {"codes": first | second << 2}
    if scheme.bits == 3:
        high = [(part >> 2 & 0x11) << turn for turn, part in enumerate(nibbles.chunk(4))]
        packed["high"] = high[0] | high[1] | high[2] | high[3]
    return packed


def expand_codes(parts: Tensors, scheme: Scheme, nibbles: torch.Tensor) -> None:
    """Write the lifted nibbles, uint8[N * K / 2] of `pack_codes`, from the bit planes."""
    if scheme.bits == 4:
        nibbles.copy_(parts["codes"])
    elif scheme.bits == 3:
        _expand_three_bits(parts["codes"], parts["high"], scheme, nibbles)
    else:
        _expand_two_bits(parts["codes"], scheme, nibbles)


def _everywhere(byte: int) -> int:
    return byte * 0x0101010101010101


def _block_bytes(plane: torch.Tensor) -> int:
    return _BLOCK_BYTES if plane.device.type == "cpu" else max(8, plane.numel())


def _words(plane: torch.Tensor, block_bytes: int) -> list[torch.Tensor]:
    words, step = plane.view(torch.int64), block_bytes // 8
    return [words[start : start + step] for start in range(0, words.numel(), step)]


def _expand_two_bits(codes: torch.Tensor, scheme: Scheme, nibbles: torch.Tensor) -> None:
    mask, lift = _everywhere(0x33), _everywhere(0x11 * scheme.lift)
    block = _block_bytes(codes)
    for half, out in enumerate(nibbles.chunk(2)):
        for source, to in zip(_words(codes, block), _words(out, block), strict=True):
            torch.bitwise_right_shift(source, 2 * half, out=to)
            to.bitwise_and_(mask).add_(lift)


def _expand_three_bits(
    codes: torch.Tensor, high: torch.Tensor, scheme: Scheme, nibbles: torch.Tensor
) -> None:
    low_mask, high_mask = _everywhere(0x33), _everywhere(0x44)
    lift = _everywhere(0x11 * scheme.lift)
    block = _block_bytes(high)
    scratch = torch.empty(block // 8, dtype=torch.int64, device=codes.device)
    halves = codes.chunk(2)
    for quarter, out in enumerate(nibbles.chunk(4)):
        sources = (halves[quarter % 2], high, out)
        planes = zip(*(_words(source, block) for source in sources), strict=True)
        for low_words, high_words, to in planes:
            top = scratch[: to.numel()]
            if quarter < 3:
                torch.bitwise_left_shift(high_words, 2 - quarter, out=top)
            else:
                torch.bitwise_right_shift(high_words, 1, out=top)
            top.bitwise_and_(high_mask)
            torch.bitwise_right_shift(low_words, 2 * (quarter // 2), out=to)
            to.bitwise_and_(low_mask).bitwise_or_(top).add_(lift)


def expand_scales(parts: Tensors, scheme: Scheme, out: torch.Tensor) -> None:
    """Write the kernel's scales and zero terms, bfloat16[passes, K / group / passes, N, 2].

    The kernel computes (nibble - 8) x scale + term, so term = (8 - lift - zero) x scale.
    """
    flat = out.view(-1, 2)
    steps = parts["ranges"].float()
    steps[:2] /= SCALE_UNIT
    block = _BLOCK_BYTES // META_GROUP // 4
    for start in range(0, steps.shape[1], block):
        group = slice(start, start + block)
        weights = slice(start * META_GROUP, (start + block) * META_GROUP)
        to = flat[weights]
        scales = _affine(parts["scales"], steps[:2], weights, group)
        zeros = _affine(parts["zeros"], steps[2:], weights, group)
        terms = zeros.sub_(8 - scheme.lift).mul_(scales).neg_()
        to[:, 0].copy_(scales[: len(to)])
        to[:, 1].copy_(terms[: len(to)])


def _affine(
    codes: torch.Tensor, ranges: torch.Tensor, weights: slice, group: slice
) -> torch.Tensor:
    values = codes[weights].view(-1, META_GROUP).float()
    return values.mul_(ranges[0, group, None]).add_(ranges[1, group, None]).view(-1)


def unpack_codes(nibbles: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes uint8[N, columns] of stored nibbles, as lifted as they are."""
    blocks = nibbles.view(-1, columns, 2, 16)
    first, second = blocks[:, :, 0], blocks[:, :, 1]
    quarters = torch.stack([first & 15, second & 15, first >> 4, second >> 4], 1)
    return quarters.transpose(2, 3).reshape(-1, columns)


def dequantise(parts: Tensors, scheme: Scheme, rows: int, columns: int) -> torch.Tensor:
    """The weights [rows, columns] in float32, by the plain formula (code - zero) x scale."""
    padded = align_up(rows, ROWS)
    groups = columns // scheme.group
    nibbles = torch.empty(padded * columns // 2, dtype=torch.uint8, device=parts["codes"].device)
    expand_codes(parts, scheme, nibbles)
    scales, zeros = (
        values[: groups * padded]
        .view(scheme.passes, groups // scheme.passes, padded)
        .permute(2, 1, 0)
        .reshape(padded, groups, 1)
        for values in _metas(parts)
    )
    codes = unpack_codes(nibbles, columns).float().sub_(scheme.lift)
    grouped = codes.view(padded, groups, scheme.group)
    return ((grouped - zeros) * scales).view(padded, columns)[:rows]


def _metas(parts: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros in float32, ordered as stored."""
    ranges = parts["ranges"].float()
    every = slice(None)
    return (
        _affine(parts["scales"], ranges[:2] / SCALE_UNIT, every, every),
        _affine(parts["zeros"], ranges[2:], every, every),
    )
