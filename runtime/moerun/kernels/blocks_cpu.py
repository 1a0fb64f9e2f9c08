"""Matrices in llama.cpp's blocks times activations of 8 bits, compiled by numba for the CPU.

As llama.cpp multiplies by Q4_0 and Q8_0: activations are rounded to 8 bits in blocks of 32 with a
scale each, products within a block are summed as integers, and blocks in float32, in their order.
So a result does not depend on how many tokens or threads there are, or on the processor's width.

A piece of work is a C function of one argument, the address of a job's words. Threads that call it
at the same time share the job out by a counter. Everything else in a job is an address or a size;
addresses are those of tensors that the caller holds.

Importing this imports numba, so it is imported where such weights are first computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from moepolicy.codecache import keep
from moepolicy.numba_internals import c_function

from moerun.format.precision import TILE_ROWS
from moerun.kernels import blocks_ir
from moerun.kernels.blocks_ir import (
    WEIGHTS_A_SCALE,
    claim,
    floats,
    ints,
    longs,
    shorts,
    signed_bytes,
    tile_of,
)

TILE = 8  # tokens that rows are unpacked for at once

_FILES = (Path(__file__), Path(blocks_ir.__file__))
_DIGEST = hashlib.sha256(f"numba {numba.__version__} ".encode())
for _file in _FILES:
    _DIGEST.update(_file.read_bytes())
_jit: Any = numba.njit(nogil=True, error_model="numpy")


class JobWords(NamedTuple):
    """Where the words of a job are, int64. A table follows: the addresses of codes and scales of
    each of its matrices.

    Rounded activations are int8[T, K], then their scales float32[T, K / 32] and minus the sums that
    a code of ``zero`` adds, int32[T, K / 32]; those of the next matrix come ``x_stride`` bytes on.
    """

    next: int = 0  # counters that threads share have a cache line of their own
    worker: int = 1
    chunks: int = 8
    bits: int = 9
    zero: int = 10  # the code of a weight of 0
    tokens: int = 11
    groups: int = 12  # blocks of a row
    row_blocks: int = 13  # of 16 rows, of a matrix
    a_chunk: int = 14  # row blocks, or blocks of hidden values
    raw: int = 15  # activations [T, K] before they are rounded
    raw_is_float: int = 16  # float32; else bfloat16
    x: int = 17
    x_stride: int = 18
    out: int = 19  # of products float32[T, N up to a multiple of 16]; of hidden values as x
    out_stride: int = 20
    scratch: int = 21
    scratch_bytes: int = 22  # of a thread
    table: int = 24


JOB = JobWords()


def _rows_times_tokens(one: Any, many: Any) -> Any:
    """16 rows times all tokens, ``TILE`` of them at a time; the others one by one."""

    @_jit  # type: ignore[untyped-decorator]
    def multiply(
        codes: Any, scales: Any, groups: Any, x: Any, tokens: Any, out: Any, token_bytes: Any
    ) -> None:
        x_bytes, word_bytes = groups * WEIGHTS_A_SCALE, groups * 4
        x_scales = x + tokens * x_bytes
        x_sums = x_scales + tokens * word_bytes
        t = 0
        while t < tokens:
            words = (
                codes,
                scales,
                groups,
                x + t * x_bytes,
                x_scales + t * word_bytes,
                x_sums + t * word_bytes,
                x_bytes,
                out + t * token_bytes,
                token_bytes,
            )
            if t + TILE <= tokens:
                many(words)
                t += TILE
            else:
                one(words)
                t += 1

    return multiply


_times_four = _rows_times_tokens(tile_of(4, 1), tile_of(4, TILE))
_times_eight = _rows_times_tokens(tile_of(8, 1), tile_of(8, TILE))


@_jit  # type: ignore[untyped-decorator]
def _block_of_rows(job: Any, matrix: Any, block: Any, out: Any, token_bytes: Any) -> None:
    """Rows 16 x block to 16 x block + 15 of a matrix times all tokens."""
    groups, bits, tokens = job[JOB.groups], job[JOB.bits], job[JOB.tokens]
    at = JOB.table + 2 * matrix
    codes = job[at] + block * groups * (bits * WEIGHTS_A_SCALE * TILE_ROWS // 8)
    scales = job[at + 1] + block * groups * (2 * TILE_ROWS)
    x = job[JOB.x] + matrix * job[JOB.x_stride]
    if bits == 4:
        _times_four(codes, scales, groups, x, tokens, out, token_bytes)
    else:
        _times_eight(codes, scales, groups, x, tokens, out, token_bytes)


@_jit  # type: ignore[untyped-decorator]
def round_group(values: Any, zero: Any, out: Any, group: Any, n: Any) -> None:
    """Round 32 values to 8 bits: they are the ``group`` of ``n`` at ``out``."""
    codes = numba.carray(signed_bytes(out + group * WEIGHTS_A_SCALE), WEIGHTS_A_SCALE)
    most = np.float32(0)
    for i in range(WEIGHTS_A_SCALE):
        most = max(most, abs(values[i]))
    inverse = np.float32(127) / most if most > 0 else np.float32(0)
    total = np.int32(0)
    for i in range(WEIGHTS_A_SCALE):
        rounded = np.int32(np.rint(values[i] * inverse))
        codes[i] = np.int8(rounded)
        total += rounded
    scales = out + n * WEIGHTS_A_SCALE
    numba.carray(floats(scales), n)[group] = most / np.float32(127)
    numba.carray(ints(scales + 4 * n), n)[group] = np.int32(-total * zero)


@_jit  # type: ignore[untyped-decorator]
def _gate(gate: Any, up: Any) -> None:
    """up x SiLU(gate), written to ``up``: float32[32] each."""
    for i in range(WEIGHTS_A_SCALE):
        up[i] *= gate[i] / (np.float32(1) + np.exp(-gate[i]))


def _multiply(address: Any) -> None:
    """Each matrix of a job times its x: a chunk is some row blocks of one of them."""
    job = numba.carray(longs(address), 1 << 30)
    blocks, a_chunk = job[JOB.row_blocks], job[JOB.a_chunk]
    of_one = -(-blocks // a_chunk)
    while True:
        chunk = claim(address + 8 * JOB.next)
        if chunk >= job[JOB.chunks]:
            return
        matrix, first = chunk // of_one, chunk % of_one * a_chunk
        out = job[JOB.out] + matrix * job[JOB.out_stride]
        for block in range(first, min(first + a_chunk, blocks)):
            to = out + block * (4 * TILE_ROWS)
            _block_of_rows(job, matrix, block, to, blocks * (4 * TILE_ROWS))


def _hidden(address: Any) -> None:
    """Each matrix of a job is a gate and an up projection, one below the other: up(x) x
    SiLU(gate(x)), rounded to 8 bits. A chunk is some blocks of 32 hidden values of one expert."""
    job = numba.carray(longs(address), 1 << 30)
    tokens, half, a_chunk = job[JOB.tokens], job[JOB.row_blocks] // 2, job[JOB.a_chunk]
    n_groups = half // 2
    of_one = -(-n_groups // a_chunk)
    gates = job[JOB.scratch] + claim(address + 8 * JOB.worker) * job[JOB.scratch_bytes]
    ups = gates + tokens * (4 * WEIGHTS_A_SCALE)
    while True:
        chunk = claim(address + 8 * JOB.next)
        if chunk >= job[JOB.chunks]:
            return
        matrix, first = chunk // of_one, chunk % of_one * a_chunk
        out = job[JOB.out] + matrix * job[JOB.out_stride]
        for group in range(first, min(first + a_chunk, n_groups)):
            for part in range(2):
                block, at = 2 * group + part, part * (4 * TILE_ROWS)
                _block_of_rows(job, matrix, block, gates + at, 4 * WEIGHTS_A_SCALE)
                _block_of_rows(job, matrix, half + block, ups + at, 4 * WEIGHTS_A_SCALE)
            for t in range(tokens):
                gate = numba.carray(floats(gates + t * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
                up = numba.carray(floats(ups + t * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
                _gate(gate, up)
                round_group(up, job[JOB.zero], out, t * n_groups + group, tokens * n_groups)


def _round(address: Any) -> None:
    """Round the activations of a job to 8 bits."""
    job = numba.carray(longs(address), 1 << 30)
    n, zero, x = job[JOB.tokens] * job[JOB.groups], job[JOB.zero], job[JOB.x]
    if job[JOB.raw_is_float]:
        for group in range(n):
            values = numba.carray(
                floats(job[JOB.raw] + group * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE
            )
            round_group(values, zero, x, group, n)
        return
    wide = np.empty(WEIGHTS_A_SCALE, np.uint32)
    for group in range(n):
        halves = numba.carray(shorts(job[JOB.raw] + group * (2 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
        for i in range(WEIGHTS_A_SCALE):
            wide[i] = np.uint32(halves[i]) << np.uint32(16)
        round_group(wide.view(np.float32), zero, x, group, n)


@cache
def _compiled(work: Callable[..., None]) -> Any:
    name = f"blocks{work.__name__}-{_DIGEST.hexdigest()[:32]}"
    return c_function(work, "void(int64)", lambda function: keep(function, name))


def address_of(work: str) -> int:
    """The address of a C function of one int64 argument: ``round``, ``hidden`` or ``multiply``.
    It is compiled on the first call, and its code kept on disk."""
    address: int = _compiled(_WORK[work]).address
    return address


_WORK = {"round": _round, "hidden": _hidden, "multiply": _multiply}
