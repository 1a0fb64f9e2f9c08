"""Dequantising FP8 and FP4 with scales of blocks, compiled by numba for the CPU.

Each takes codes, uint8[rows, columns or half of them], and scales, float32[grid], and writes the
rows from `first` to `last` of `out`: bfloat16 as uint16, or float32. Values times scales in
float32, rounded once to the nearest, ties to even. `table` has the values of all codes.

Importing this imports numba, so it is imported where such weights are first computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from moepolicy.codecache import keep

from moerun.format.coding import FP4_VALUES

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
_E2M1 = np.array(FP4_VALUES, dtype=np.float32)
_DIGEST = hashlib.sha256(f"numba {numba.__version__} ".encode() + Path(__file__).read_bytes())


Part = TypeVar("Part", bound=Callable[..., Any])


def _inlined(function: Part) -> Part:
    return cast(Part, numba.njit(nogil=True, error_model="numpy", inline="always")(function))


def _jit(function: Callable[..., Any], name: str) -> Any:
    """`function` compiled on its first call, its code kept on disk."""
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    keep(kernel, f"{name}-{_DIGEST.hexdigest()[:32]}")
    return kernel


@_inlined
def _scale(row: Any, scales: Any, block_columns: int) -> None:
    """Multiply the values of a row by their scales."""
    if block_columns == 1:
        for c in range(row.size):
            row[c] *= scales[c]
        return
    for b in range(scales.size):
        scale = scales[b]
        for c in range(b * block_columns, min(row.size, (b + 1) * block_columns)):
            row[c] *= scale


@_inlined
def _to_bfloat16(bits: Any, out: Any) -> None:
    """Write a row of float32, given as its bits, as bfloat16."""
    for c in range(bits.size):
        u = bits[c]
        rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[c] = np.uint16(np.uint32(0x7FC0) if nan else rounded)


@_inlined
def _scaled(line: Any, table: Any, scales: Any, block_columns: int, row: Any) -> None:
    """Values times scales in one pass, which takes two thirds of the time of two."""
    for b in range(scales.size):
        scale = scales[b]
        for c in range(b * block_columns, min(row.size, (b + 1) * block_columns)):
            row[c] = table[line[c]] * scale


def _e4m3_to_bfloat16(
    table: Any,
    codes: Any,
    scales: Any,
    block_rows: int,
    block_columns: int,
    first: int,
    last: int,
    out: Any,
) -> None:
    row = np.empty(out.shape[1], np.float32)
    bits = row.view(np.uint32)
    for r in range(first, last):
        _scaled(codes[r], table, scales[r // block_rows], block_columns, row)
        _to_bfloat16(bits, out[r])


def _e4m3_to_float32(
    table: Any,
    codes: Any,
    scales: Any,
    block_rows: int,
    block_columns: int,
    first: int,
    last: int,
    out: Any,
) -> None:
    for r in range(first, last):
        _scaled(codes[r], table, scales[r // block_rows], block_columns, out[r])


def _e2m1_to_bfloat16(
    codes: Any, scales: Any, block_rows: int, block_columns: int, first: int, last: int, out: Any
) -> None:
    row = np.empty(out.shape[1], np.float32)
    bits = row.view(np.uint32)
    for r in range(first, last):
        line = codes[r]
        # The codes' values by shifts instead of a table, so that many are made at once.
        for j in range(line.size):
            for half in range(2):
                code = (np.uint32(line[j]) >> np.uint32(4 * half)) & np.uint32(15)
                size = code & np.uint32(7)
                value = np.uint32(0x3F800000) + ((size - np.uint32(2)) << np.uint32(22))
                value = np.uint32(0x3F000000) if size == np.uint32(1) else value
                value = np.uint32(0) if size == np.uint32(0) else value
                bits[2 * j + half] = value | ((code & np.uint32(8)) << np.uint32(28))
        _scale(row, scales[r // block_rows], block_columns)
        _to_bfloat16(bits, out[r])


def _e2m1_to_float32(
    table: Any,
    codes: Any,
    scales: Any,
    block_rows: int,
    block_columns: int,
    first: int,
    last: int,
    out: Any,
) -> None:
    for r in range(first, last):
        line, row = codes[r], out[r]
        for j in range(line.size):
            row[2 * j] = table[line[j] & 15]
            row[2 * j + 1] = table[line[j] >> 4]
        _scale(row, scales[r // block_rows], block_columns)


KERNELS = {
    ("e4m3", torch.bfloat16): partial(_jit(_e4m3_to_bfloat16, "e4m3_to_bfloat16"), _E4M3),
    ("e4m3", torch.float32): partial(_jit(_e4m3_to_float32, "e4m3_to_float32"), _E4M3),
    ("e2m1", torch.bfloat16): _jit(_e2m1_to_bfloat16, "e2m1_to_bfloat16"),
    ("e2m1", torch.float32): partial(_jit(_e2m1_to_float32, "e2m1_to_float32"), _E2M1),
}
"""By elements and what they become, the table given. The table is an argument, since numba reads a
constant array one value at a time."""
