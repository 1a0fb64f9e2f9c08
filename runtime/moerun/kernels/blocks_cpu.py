"""Matrices in llama.cpp's blocks times activations of 8 bits, compiled by numba for the CPU.

As llama.cpp multiplies by Q4_0 and Q8_0: activations are rounded to 8 bits in groups of 32 with a
scale each, products of weights that share a scale are summed as integers, and these sums in
float32, in their order. So a result does not depend on how many tokens or threads there are, or on
the processor's width. For the K types llama.cpp rounds activations in groups of 256; here they are
rounded in groups of 32 for all types, with a smaller error.

The work on matrices is compiled for each type of blocks, when it is first needed.

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

from moerun.format import block_scheme
from moerun.format.block_scheme import TILE_ROWS, BlockScheme
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

_FILES = (Path(__file__), Path(blocks_ir.__file__), Path(block_scheme.__file__))
_DIGEST = hashlib.sha256(f"numba {numba.__version__} ".encode())
for _file in _FILES:
    _DIGEST.update(_file.read_bytes())
_jit: Any = numba.njit(nogil=True, error_model="numpy")


class JobWords(NamedTuple):
    """Where the words of a job are, int64. A table follows: the addresses of codes and scales of
    each of its matrices.

    Rounded activations are int8[T, K], then their scales float32[T, K / 32] and, for each sum that
    a product needs of them, minus that sum times ``zero``, int32[T, K / 32, sums]; those of the
    next matrix come ``x_stride`` bytes on.
    """

    next: int = 0  # counters that threads share have a cache line of their own
    worker: int = 1
    chunks: int = 8
    zero: int = 9
    sums: int = 10  # of a group of activations
    tokens: int = 11
    groups: int = 12  # of 32 columns
    row_blocks: int = 13  # of 16 rows, of a matrix
    a_chunk: int = 14  # row blocks, or groups of hidden values
    raw: int = 15  # activations [T, K] before they are rounded
    raw_is_float: int = 16  # float32; else bfloat16
    x: int = 17
    x_stride: int = 18
    out: int = 19  # of products float32[T, N up to a multiple of 16]; of hidden values as x
    out_stride: int = 20
    scratch: int = 21
    scratch_bytes: int = 22  # of a thread
    out_zero: int = 23  # of hidden values, as ``zero``
    out_sums: int = 24
    table: int = 25


JOB = JobWords()


def _rows_times_tokens(scheme: BlockScheme) -> Any:
    """16 rows times all tokens, ``TILE`` of them at a time; the others one by one."""
    one, many = tile_of(scheme, 1), tile_of(scheme, TILE)
    sums_bytes = 4 * scheme.sums_a_group

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
                x_sums + t * (groups * sums_bytes),
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


@cache
def _block_of_rows(scheme: BlockScheme) -> Any:
    """What multiplies rows 16 x block to 16 x block + 15 of a matrix by all tokens."""
    times = _rows_times_tokens(scheme)
    code_bytes = scheme.bits * WEIGHTS_A_SCALE * TILE_ROWS // 8
    in_one, scale_bytes = scheme.block // WEIGHTS_A_SCALE, scheme.scale_bytes * TILE_ROWS

    @_jit  # type: ignore[untyped-decorator]
    def multiply(job: Any, matrix: Any, block: Any, out: Any, token_bytes: Any) -> None:
        groups, tokens = job[JOB.groups], job[JOB.tokens]
        at = JOB.table + 2 * matrix
        codes = job[at] + block * groups * code_bytes
        scales = job[at + 1] + block * (groups // in_one) * scale_bytes
        x = job[JOB.x] + matrix * job[JOB.x_stride]
        times(codes, scales, groups, x, tokens, out, token_bytes)

    return multiply


@_jit  # type: ignore[untyped-decorator]
def round_group(values: Any, zero: Any, sums: Any, out: Any, group: Any, n: Any) -> None:
    """Round 32 values to 8 bits: they are the ``group`` of ``n`` at ``out``."""
    codes = numba.carray(signed_bytes(out + group * WEIGHTS_A_SCALE), WEIGHTS_A_SCALE)
    most = np.float32(0)
    for i in range(WEIGHTS_A_SCALE):
        most = max(most, abs(values[i]))
    inverse = np.float32(127) / most if most > 0 else np.float32(0)
    for i in range(WEIGHTS_A_SCALE):
        codes[i] = np.int8(np.rint(values[i] * inverse))
    scales = out + n * WEIGHTS_A_SCALE
    numba.carray(floats(scales), n)[group] = most / np.float32(127)
    totals = numba.carray(ints(scales + 4 * n), n * sums)
    a_sum = WEIGHTS_A_SCALE // sums
    for part in range(sums):
        total = np.int32(0)
        for i in range(a_sum):
            total += np.int32(codes[part * a_sum + i])
        totals[group * sums + part] = np.int32(-total * zero)


@_jit  # type: ignore[untyped-decorator]
def _gate(gate: Any, up: Any) -> None:
    """up x SiLU(gate), written to ``up``: float32[32] each."""
    for i in range(WEIGHTS_A_SCALE):
        up[i] *= gate[i] / (np.float32(1) + np.exp(-gate[i]))


def _multiply(scheme: BlockScheme) -> Callable[[Any], None]:
    """Each matrix of a job times its x: a chunk is some row blocks of one of them."""
    block_of_rows = _block_of_rows(scheme)

    def multiply(address: Any) -> None:
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
                block_of_rows(job, matrix, block, to, blocks * (4 * TILE_ROWS))

    return multiply


def _hidden(scheme: BlockScheme) -> Callable[[Any], None]:
    """Each matrix of a job is a gate and an up projection, one below the other: up(x) x
    SiLU(gate(x)), rounded to 8 bits. A chunk is some groups of 32 hidden values of one expert."""
    block_of_rows = _block_of_rows(scheme)

    def hidden(address: Any) -> None:
        job = numba.carray(longs(address), 1 << 30)
        tokens, half, a_chunk = job[JOB.tokens], job[JOB.row_blocks] // 2, job[JOB.a_chunk]
        n_groups = half // 2
        of_one = -(-n_groups // a_chunk)
        gates = job[JOB.scratch] + claim(address + 8 * JOB.worker) * job[JOB.scratch_bytes]
        ups = gates + tokens * (4 * WEIGHTS_A_SCALE)
        zero, sums = job[JOB.out_zero], job[JOB.out_sums]
        while True:
            chunk = claim(address + 8 * JOB.next)
            if chunk >= job[JOB.chunks]:
                return
            matrix, first = chunk // of_one, chunk % of_one * a_chunk
            out = job[JOB.out] + matrix * job[JOB.out_stride]
            for group in range(first, min(first + a_chunk, n_groups)):
                for part in range(2):
                    block, at = 2 * group + part, part * (4 * TILE_ROWS)
                    block_of_rows(job, matrix, block, gates + at, 4 * WEIGHTS_A_SCALE)
                    block_of_rows(job, matrix, half + block, ups + at, 4 * WEIGHTS_A_SCALE)
                for t in range(tokens):
                    gate = numba.carray(floats(gates + t * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
                    up = numba.carray(floats(ups + t * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
                    _gate(gate, up)
                    round_group(up, zero, sums, out, t * n_groups + group, tokens * n_groups)

    return hidden


def _round(address: Any) -> None:
    """Round the activations of a job to 8 bits."""
    job = numba.carray(longs(address), 1 << 30)
    n, zero, x = job[JOB.tokens] * job[JOB.groups], job[JOB.zero], job[JOB.x]
    sums = job[JOB.sums]
    if job[JOB.raw_is_float]:
        for group in range(n):
            values = numba.carray(
                floats(job[JOB.raw] + group * (4 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE
            )
            round_group(values, zero, sums, x, group, n)
        return
    wide = np.empty(WEIGHTS_A_SCALE, np.uint32)
    for group in range(n):
        halves = numba.carray(shorts(job[JOB.raw] + group * (2 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
        for i in range(WEIGHTS_A_SCALE):
            wide[i] = np.uint32(halves[i]) << np.uint32(16)
        round_group(wide.view(np.float32), zero, sums, x, group, n)


@cache
def address_of(work: str, scheme: BlockScheme | None = None) -> int:
    """The address of a C function of one int64 argument: ``round``, or of matrices in a scheme's
    blocks ``hidden`` or ``multiply``. It is compiled on the first call, and its code kept on disk.
    """
    function = _round if scheme is None else _WORK[work](scheme)
    name = f"blocks_{work}{f'_{scheme.name}' if scheme else ''}-{_DIGEST.hexdigest()[:32]}"
    made = c_function(function, "void(int64)", lambda each: keep(each, name))
    _COMPILED.append(made)
    address: int = made.address
    return address


_WORK = {"hidden": _hidden, "multiply": _multiply}
_COMPILED: list[Any] = []  # which must outlive their addresses
