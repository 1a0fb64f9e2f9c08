"""HQQ quantisation: hqq's `Quantizer` finds the numbers, `bitplanes` lays them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from moerun.errors import RunError
from moerun.format.bitplanes import SCALE_UNIT, pack_codes
from moerun.format.layout import align_up
from moerun.format.precision import META_GROUP, ROWS, Scheme

# HQQ's optimiser on blocks of rows that fit the cache is 8 times as fast as on a whole matrix.
_BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 25}
_CONSTANT = 1e-4  # HQQ's own threshold for a group whose weights are all one value

RunBlocks = Callable[[Callable[[torch.Tensor], Any], Iterable[torch.Tensor]], Iterable[Any]]


def quantise(
    weight: torch.Tensor, scheme: Scheme, *, device: str = "cpu", run: RunBlocks = map
) -> dict[str, torch.Tensor]:
    """Quantise weight[N, K] into the tensors of `scheme.parts(N, K)`, on the CPU.

    `run` maps a function over row blocks and keeps their order: pass an executor's `map` to use
    many threads. The result does not depend on it, but does on the kind of device.
    Raises RunError when weights are not finite or K does not divide into groups.
    """
    rows, columns = weight.shape
    scheme.check("a matrix", columns)
    step = max(1, _BLOCK_WEIGHTS[torch.device(device).type] // columns)

    def quantise_block(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _quantise_block(block, scheme, device)

    blocks = [weight[start : start + step] for start in range(0, rows, step)]
    codes, scales, zeros = zip(*run(quantise_block, blocks), strict=True)
    pad = align_up(rows, ROWS) - rows
    packed = pack_codes(_pad_rows(torch.cat(codes), pad), scheme)
    scale_codes, scale_ranges = _eight_bits(
        _pad_rows(torch.cat(scales) * SCALE_UNIT, pad), scheme.passes
    )
    zero_codes, zero_ranges = _eight_bits(_pad_rows(torch.cat(zeros), pad), scheme.passes)
    ranges = torch.cat([scale_ranges, zero_ranges])
    if not bool(torch.isfinite(ranges).all()):
        raise RunError("its weights are too large to quantise: pack with bf16")
    return {**packed, "scales": scale_codes, "zeros": zero_codes, "ranges": ranges}


def _quantise_block(
    block: torch.Tensor, scheme: Scheme, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8[n, K], scales and zeros float32[n, K / group] of a block of rows."""
    from hqq.core.quantize import Quantizer

    weights = block.to(device=device, dtype=torch.float32)
    if not bool(torch.isfinite(weights).all()):
        raise RunError("it has weights that are not finite")
    codes, meta = Quantizer.quantize(
        weights, nbits=scheme.bits, group_size=scheme.group, axis=1, bitpack=False, device=device
    )
    grouped = (block.shape[0], block.shape[1] // scheme.group)
    scales, zeros = meta["scale"].float().view(grouped), meta["zero"].float().view(grouped)
    codes = codes.view(*grouped, scheme.group)
    codes, scales, zeros = _mend_constant_groups(weights.view_as(codes), codes, scales, zeros)
    return codes.reshape(block.shape).to("cpu", torch.uint8), scales.cpu(), zeros.cpu()


def _mend_constant_groups(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros, groups of one value having the scale of the rest of the block.

    HQQ gives them scale 1, a hundred times that of the neighbours with which they share an 8-bit
    range.
    """
    least, most = weights.aminmax(dim=-1)
    constant = (most - least) <= _CONSTANT
    if not bool(constant.any()):
        return codes, scales, zeros
    others = scales[~constant]
    scale = others.median() if others.numel() else scales.new_tensor(1 / SCALE_UNIT)
    return (
        codes.masked_fill(constant[..., None], 0),
        torch.where(constant, scale, scales),
        torch.where(constant, -(least + most) / 2 / scale, zeros),
    )


def _pad_rows(values: torch.Tensor, pad: int) -> torch.Tensor:
    return torch.cat([values, values[-1:].expand(pad, -1)]) if pad else values


def _eight_bits(values: torch.Tensor, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales or zeros [N, groups] as codes uint8[n] and ranges (step, least) float16[2, n / 128].

    They are ordered by pass, group and row, as the multiply reads them.
    """
    from hqq.core.quantize import Quantizer

    rows, groups = values.shape
    ordered = values.view(rows, groups // passes, passes).permute(2, 1, 0).reshape(-1)
    tail = align_up(ordered.numel(), META_GROUP) - ordered.numel()
    codes, meta = Quantizer.quantize(
        torch.cat([ordered, ordered[-1:].expand(tail)]).view(-1, META_GROUP),
        nbits=8,
        group_size=META_GROUP,
        axis=1,
        optimize=False,
        bitpack=False,
        device="cpu",
    )
    step = meta["scale"].view(-1)
    least = -meta["zero"].view(-1) * step
    return codes.reshape(-1).to(torch.uint8), torch.stack([step, least]).to(torch.float16)
