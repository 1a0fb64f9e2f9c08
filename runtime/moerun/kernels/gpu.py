"""Multiplies by quantised matrices straight from their packed records, on a GPU, in Triton.

Codes, 8-bit scales and zeros are read where the link put them, and weights exist in registers
only. The libraries that have such kernels (gemlite, torch's int4) want codes in an order of their
own and scales in 16 bits, which would be a second copy of every expert, at 2 bits a third larger,
and have none for 3 bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton

from moerun.format.bitplanes import SCALE_UNIT
from moerun.format.layout import align_up
from moerun.format.precision import META_GROUP, ROWS, Scheme, Tensors
from moerun.kernels.gpu_triton import COLUMNS, WORDS, multiply_many, multiply_one

_TOKENS = (16, 64)  # of one tile, least and most: tensor cores know no fewer than 16
_WAVES = 4  # programs for each multiprocessor, where columns suffice to share the work so far
_LEAST_SPAN = 128  # columns of one program


def multiply(x: torch.Tensor, parts: Tensors, scheme: Scheme, rows: int) -> torch.Tensor:
    """x[T, K] through a packed matrix [rows, K], in the dtype of x; products summed in float32.

    ``parts`` are those of `Scheme.parts`, on x's device. Equal calls give equal bits: what
    programs that share a row's columns have found is summed in a fixed order.
    """
    if not len(x):
        return x.new_empty(0, rows)
    launch = _one if len(x) == 1 else _many
    with _on(x.device):
        found = launch(x.contiguous(), parts, scheme, align_up(rows, ROWS))
    total = found[0] if len(found) == 1 else found.sum(0)
    return total[:, :rows].to(x.dtype)


def _one(x: torch.Tensor, parts: Tensors, scheme: Scheme, rows: int) -> torch.Tensor:
    """float32[programs that share a row, 1, rows] for a single token."""
    programs = triton.cdiv(rows, 8 * WORDS)
    splits, span = _share(programs, x.shape[1], x.device)
    out = torch.empty((splits, 1, rows), dtype=torch.float32, device=x.device)
    words = {name: parts[name].view(torch.uint32) for name in ("codes", "scales", "zeros")}
    multiply_one[(programs, splits)](
        x,
        words["codes"],
        parts["high"].view(torch.uint32) if "high" in parts else words["codes"],
        words["scales"],
        words["zeros"],
        parts["ranges"],
        out,
        rows,
        x.shape[1],
        span,
        parts["ranges"].shape[1],
        1.0 / SCALE_UNIT,
        **constants_of(scheme),
    )
    return out


def _many(x: torch.Tensor, parts: Tensors, scheme: Scheme, rows: int) -> torch.Tensor:
    """float32[programs that share a row, T, rows] for many tokens."""
    tokens, columns = x.shape
    tile = min(max(_TOKENS[0], triton.next_power_of_2(tokens)), _TOKENS[1])
    tiles = triton.cdiv(tokens, tile)
    splits, span = _share(rows // ROWS * tiles, columns, x.device)
    out = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    multiply_many[(rows // ROWS, splits, tiles)](
        x,
        parts["codes"],
        parts.get("high", parts["codes"]),
        parts["scales"],
        parts["zeros"],
        parts["ranges"],
        out,
        tokens,
        rows,
        columns,
        span,
        parts["ranges"].shape[1],
        1.0 / SCALE_UNIT,
        TOKENS=tile,
        **constants_of(scheme),
    )
    return out


def constants_of(scheme: Scheme) -> dict[str, int]:
    """What the kernels are compiled for."""
    return {
        "BITS": scheme.bits,
        "GROUP": scheme.group,
        "PASSES": scheme.passes,
        "META_GROUP": META_GROUP,
    }


def _share(programs: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Among how many programs, and by how many columns each, the columns are shared out."""
    wanted = -(-_WAVES * _multiprocessors(device) // programs)
    span = max(_LEAST_SPAN, align_up(-(-columns // wanted), COLUMNS))
    return -(-columns // span), span


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
