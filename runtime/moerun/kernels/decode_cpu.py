"""A decoded token's way through a layer beside its matrices, compiled by numba for the CPU: norms,
rotation, attention to the keys and values held, gates, and rows of bfloat16.

Numbers are bfloat16 where transformers' modules have them so, and rounded at the same places; sums
are float32. Their order is another one than torch's, so a last bit may differ from torch's.

As in `blocks_cpu`, a piece of work is a C function of one argument, the address of a job's words,
and threads that call it at the same time share a job out by a counter.
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

from moerun.kernels import blocks_cpu, blocks_ir, halves_ir
from moerun.kernels.blocks_cpu import round_group
from moerun.kernels.blocks_ir import WEIGHTS_A_SCALE, claim, floats, longs, shorts, signed_bytes
from moerun.kernels.halves_ir import add_weighted, bits_of, dot_halves, float_of

TOKENS_AT_ONCE = 128  # whose keys or values all query heads of a group take while they are near

_FILES = tuple(Path(file) for file in (__file__, halves_ir.__file__, blocks_ir.__file__))
_DIGEST = hashlib.sha256(f"numba {numba.__version__} ".encode())
for _file in (*_FILES, Path(blocks_cpu.__file__)):
    _DIGEST.update(_file.read_bytes())
_jit: Any = numba.njit(nogil=True, error_model="numpy")


class NormWords(NamedTuple):
    """A job of `norm`, int64: addresses, but for ``width``, ``zero`` and ``sums``."""

    x: int = 0  # bfloat16[width]
    y: int = 1  # float32[width], to be added first; 0: nothing is
    total: int = 2  # of x + y, bfloat16[width]
    weight: int = 3  # bfloat16[width]
    eps: int = 4  # float32[1]
    width: int = 5
    out: int = 6  # bfloat16[width]
    rounded: int = 7  # the same in 8 bits, as `blocks_cpu` has activations; 0: it is not wanted
    zero: int = 8  # of those, as of `blocks_cpu`'s jobs
    sums: int = 9
    last: int = 10


class AttendWords(NamedTuple):
    """A job of `attend`, int64."""

    next: int = 0  # counters that threads share have a cache line of their own
    worker: int = 1
    heads: int = 8  # of keys and values
    group: int = 9  # query heads of each
    width: int = 10  # of a head
    held: int = 11  # tokens before this one
    projected: int = 12  # float32: queries, keys, values
    bias: int = 13  # bfloat16, likewise; 0: there is none
    query_norm: int = 14  # bfloat16[width]; 0: there is none
    key_norm: int = 15
    numbers: int = 16  # float32: eps of the norms, what scores are multiplied by
    cosines: int = 17  # bfloat16[width]
    sines: int = 18
    keys: int = 19  # bfloat16[heads, tokens, width], of which this token's are written
    values: int = 20
    head_bytes: int = 21  # from the keys of a head to those of the next
    mask: int = 22  # bool[held + 1]; 0: all tokens are seen
    rounded: int = 23  # what comes out, in 8 bits
    zero: int = 24  # of those, as of `blocks_cpu`'s jobs
    sums: int = 25
    scratch: int = 26
    scratch_bytes: int = 27  # of a thread
    last: int = 28


class RowsWords(NamedTuple):
    """A job of `rows`, int64: y = W x for a few x."""

    next: int = 0
    tokens: int = 8
    width: int = 9
    n: int = 10  # rows of the matrix
    a_chunk: int = 11
    x: int = 12  # bfloat16[tokens, width]
    weight: int = 13  # bfloat16[n, width]
    out: int = 14  # bfloat16[tokens, n]
    last: int = 15


class ChooseWords(NamedTuple):
    """A job of `choose`, int64: the experts of a token."""

    n: int = 0
    top_k: int = 1
    normalised: int = 2  # weights sum to 1
    narrow: int = 3  # weights are bfloat16; else float32
    logits: int = 4  # bfloat16[n]
    scratch: int = 5  # float32[n]
    ids: int = 6  # int64[top_k]
    weights: int = 7  # [top_k]
    last: int = 8


class WeighWords(NamedTuple):
    """A job of `weigh`, int64: rows times their weights, summed in the order of the rows."""

    n: int = 0
    width: int = 1
    rows: int = 2  # float32[n, width]
    row_bytes: int = 3  # from one to the next
    weights: int = 4  # [n]
    narrow: int = 5  # the weights are bfloat16; else float32
    out: int = 6  # bfloat16[width]
    last: int = 7


NORM, ATTEND, ROWS, CHOOSE = NormWords(), AttendWords(), RowsWords(), ChooseWords()
WEIGH = WeighWords()


def scratch_bytes(group: int, width: int, tokens: int) -> int:
    """What a thread needs to attend: queries, scores, and sums of values."""
    return group * (2 * width + 4 * tokens + 4 * width)


@_jit  # type: ignore[untyped-decorator]
def _narrow(value: Any) -> Any:
    """A float32 as bfloat16: the nearest, of two the even one."""
    bits = bits_of(value)
    if value != value:  # noqa: PLR0124
        return np.uint16(0x7FC0)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(bits >> np.uint32(16))


@_jit  # type: ignore[untyped-decorator]
def _wide(half: Any) -> Any:
    return float_of(np.uint32(half) << np.uint32(16))


@_jit  # type: ignore[untyped-decorator]
def _rounded(value: Any) -> Any:
    return _wide(_narrow(value))


@_jit  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    """e to the x, for x of 0 or less, to a few units in the last place."""
    x = max(x, np.float32(-87))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.42860677e-6)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@_jit  # type: ignore[untyped-decorator]
def _normed(x: Any, width: Any, eps: Any, weight: Any, out: Any) -> None:
    """An RMS norm of bfloat16[width]: addresses; ``out`` may be ``x``."""
    mean = dot_halves(x, x, width) / np.float32(width)
    scale = np.float32(1) / np.sqrt(mean + eps)
    given, by = numba.carray(shorts(x), width), numba.carray(shorts(weight), width)
    to = numba.carray(shorts(out), width)
    for i in range(width):
        to[i] = _narrow(_wide(by[i]) * _rounded(_wide(given[i]) * scale))


def _norm(address: Any) -> None:
    """Add and norm a token's hidden state."""
    job = numba.carray(longs(address), NORM.last)
    width, x = job[NORM.width], job[NORM.x]
    if job[NORM.y]:
        given, added = numba.carray(shorts(x), width), numba.carray(floats(job[NORM.y]), width)
        total = numba.carray(shorts(job[NORM.total]), width)
        for i in range(width):
            total[i] = _narrow(_wide(given[i]) + _rounded(added[i]))
        x = job[NORM.total]
    out = job[NORM.out]
    _normed(x, width, numba.carray(floats(job[NORM.eps]), 1)[0], job[NORM.weight], out)
    if job[NORM.rounded]:
        values = np.empty(WEIGHTS_A_SCALE, np.float32)
        n = width // WEIGHTS_A_SCALE
        for group in range(n):
            halves = numba.carray(shorts(out + group * (2 * WEIGHTS_A_SCALE)), WEIGHTS_A_SCALE)
            for i in range(WEIGHTS_A_SCALE):
                values[i] = _wide(halves[i])
            zero, sums = job[NORM.zero], job[NORM.sums]
            round_group(values, zero, sums, job[NORM.rounded], group, n)


@_jit  # type: ignore[untyped-decorator]
def _take_head(job: Any, head: Any, norm: Any, rotated: Any, out: Any) -> None:
    """A head of what was projected, as bfloat16[width] at ``out``: normed, and rotated."""
    width = job[ATTEND.width]
    to = numba.carray(shorts(out), width)
    given = numba.carray(floats(job[ATTEND.projected] + head * width * 4), width)
    for i in range(width):
        to[i] = _narrow(given[i])
    if job[ATTEND.bias]:
        bias = numba.carray(shorts(job[ATTEND.bias] + head * width * 2), width)
        for i in range(width):
            to[i] = _narrow(_wide(to[i]) + _wide(bias[i]))
    if norm:
        eps = numba.carray(floats(job[ATTEND.numbers]), 2)[0]
        _normed(out, width, eps, norm, out)
    if not rotated:
        return
    half = width // 2
    cosines = numba.carray(shorts(job[ATTEND.cosines]), width)
    sines = numba.carray(shorts(job[ATTEND.sines]), width)
    for i in range(half):
        j = i + half
        one, two = _wide(to[i]), _wide(to[j])
        to[i] = _narrow(_rounded(one * _wide(cosines[i])) + _rounded(-two * _wide(sines[i])))
        to[j] = _narrow(_rounded(two * _wide(cosines[j])) + _rounded(one * _wide(sines[j])))


@_jit  # type: ignore[untyped-decorator]
def _softmax(job: Any, scores: Any, tokens: Any) -> None:
    """Scores float32[tokens] at an address as shares of 1, of the tokens that the mask lets see."""
    scale = numba.carray(floats(job[ATTEND.numbers]), 2)[1]
    values = numba.carray(floats(scores), tokens)
    if job[ATTEND.mask]:
        seen = numba.carray(signed_bytes(job[ATTEND.mask]), tokens)
        for t in range(tokens):
            if not seen[t]:
                values[t] = np.float32(-np.inf)
    most = np.float32(-np.inf)
    for t in range(tokens):
        values[t] *= scale
        most = max(most, values[t])
    for t in range(tokens):
        values[t] = _exp(values[t] - most) if values[t] > np.float32(-np.inf) else np.float32(0)
    total = np.float32(0)
    for t in range(tokens):
        total += values[t]
    for t in range(tokens):
        values[t] /= total


@_jit  # type: ignore[untyped-decorator]
def _attend_head(job: Any, head: Any, queries: Any) -> None:
    """All query heads of a head of keys and values."""
    group, width, tokens = job[ATTEND.group], job[ATTEND.width], job[ATTEND.held] + 1
    scores = queries + 2 * group * width
    sums = scores + 4 * group * tokens
    keys = job[ATTEND.keys] + head * job[ATTEND.head_bytes]
    values = job[ATTEND.values] + head * job[ATTEND.head_bytes]
    new, first = 2 * width * job[ATTEND.held], job[ATTEND.heads] * group
    _take_head(job, first + head, job[ATTEND.key_norm], True, keys + new)
    _take_head(job, first + job[ATTEND.heads] + head, 0, False, values + new)
    for q in range(group):
        at = queries + q * 2 * width
        _take_head(job, head * group + q, job[ATTEND.query_norm], True, at)
    for start in range(0, tokens, TOKENS_AT_ONCE):
        for q in range(group):
            found = numba.carray(floats(scores + q * 4 * tokens), tokens)
            for t in range(start, min(start + TOKENS_AT_ONCE, tokens)):
                found[t] = dot_halves(queries + q * 2 * width, keys + t * 2 * width, width)
    for q in range(group):
        _softmax(job, scores + q * 4 * tokens, tokens)
    numba.carray(floats(sums), group * width)[:] = np.float32(0)
    for start in range(0, tokens, TOKENS_AT_ONCE):
        n = min(TOKENS_AT_ONCE, tokens - start)
        for q in range(group):
            weights = scores + (q * tokens + start) * 4
            rows, to = values + start * 2 * width, sums + q * 4 * width
            add_weighted(weights, rows, 2 * width, n, width, to)


def _attend(address: Any) -> None:
    """A token's attention to all tokens until itself; a chunk is a head of keys and values."""
    job = numba.carray(longs(address), ATTEND.last)
    worker = claim(address + 8 * ATTEND.worker)
    queries = job[ATTEND.scratch] + worker * job[ATTEND.scratch_bytes]
    group, width, tokens = job[ATTEND.group], job[ATTEND.width], job[ATTEND.held] + 1
    sums = queries + group * (2 * width + 4 * tokens)
    groups_a_head = width // WEIGHTS_A_SCALE
    n = job[ATTEND.heads] * group * groups_a_head
    while True:
        head = claim(address + 8 * ATTEND.next)
        if head >= job[ATTEND.heads]:
            return
        _attend_head(job, head, queries)
        found = numba.carray(floats(sums), group * width)
        for i in range(group * width):
            found[i] = _rounded(found[i])
        for place in range(group * groups_a_head):
            values = found[place * WEIGHTS_A_SCALE : (place + 1) * WEIGHTS_A_SCALE]
            at = head * group * groups_a_head + place
            zero, a_group = job[ATTEND.zero], job[ATTEND.sums]
            round_group(values, zero, a_group, job[ATTEND.rounded], at, n)


def _rows(address: Any) -> None:
    """A matrix of bfloat16 times a few tokens; a chunk is some of its rows."""
    job = numba.carray(longs(address), ROWS.last)
    width, n, tokens, a_chunk = job[ROWS.width], job[ROWS.n], job[ROWS.tokens], job[ROWS.a_chunk]
    out = numba.carray(shorts(job[ROWS.out]), tokens * n)
    while True:
        first = claim(address + 8 * ROWS.next) * a_chunk
        if first >= n:
            return
        for row in range(first, min(first + a_chunk, n)):
            weight = job[ROWS.weight] + row * 2 * width
            for t in range(tokens):
                out[t * n + row] = _narrow(dot_halves(job[ROWS.x] + t * 2 * width, weight, width))


def _choose(address: Any) -> None:
    """The softmax of a gate's logits, and the experts of the largest shares, by descending share;
    of equal ones the first."""
    job = numba.carray(longs(address), CHOOSE.last)
    n, top_k = job[CHOOSE.n], job[CHOOSE.top_k]
    logits = numba.carray(shorts(job[CHOOSE.logits]), n)
    shares = numba.carray(floats(job[CHOOSE.scratch]), n)
    ids = numba.carray(longs(job[CHOOSE.ids]), top_k)
    most, total = np.float32(-np.inf), np.float32(0)
    for i in range(n):
        shares[i] = _wide(logits[i])
        most = max(most, shares[i])
    for i in range(n):
        shares[i] = _exp(shares[i] - most)
    for i in range(n):
        total += shares[i]
    chosen = np.full(top_k, np.float32(-1))
    ids[:] = 0
    for i in range(n):
        if shares[i] > chosen[top_k - 1]:
            rank = top_k - 1
            while rank > 0 and shares[i] > chosen[rank - 1]:
                chosen[rank], ids[rank] = chosen[rank - 1], ids[rank - 1]
                rank -= 1
            chosen[rank], ids[rank] = shares[i], i
    sum_chosen = np.float32(0)
    for rank in range(top_k):
        chosen[rank] /= total
        sum_chosen += chosen[rank]
    narrow = numba.carray(shorts(job[CHOOSE.weights]), top_k)
    wide = numba.carray(floats(job[CHOOSE.weights]), top_k)
    for rank in range(top_k):
        weight = chosen[rank] / sum_chosen if job[CHOOSE.normalised] else chosen[rank]
        if job[CHOOSE.narrow]:
            narrow[rank] = _narrow(weight)
        else:
            wide[rank] = weight


def _weigh(address: Any) -> None:
    """The weighted sum of what a token's experts gave."""
    job = numba.carray(longs(address), WEIGH.last)
    n, width = job[WEIGH.n], job[WEIGH.width]
    halves = numba.carray(shorts(job[WEIGH.weights]), n)
    wholes = numba.carray(floats(job[WEIGH.weights]), n)
    total = np.zeros(width, np.float32)
    for k in range(n):
        weight = _wide(halves[k]) if job[WEIGH.narrow] else wholes[k]
        row = numba.carray(floats(job[WEIGH.rows] + k * job[WEIGH.row_bytes]), width)
        for i in range(width):
            total[i] += weight * row[i]
    out = numba.carray(shorts(job[WEIGH.out]), width)
    for i in range(width):
        out[i] = _narrow(total[i])


_WORK: dict[str, Callable[..., None]] = {
    "weigh": _weigh,
    "norm": _norm,
    "attend": _attend,
    "rows": _rows,
    "choose": _choose,
}


@cache
def address_of(work: str) -> int:
    """The address of a C function of one int64 argument: ``norm``, ``attend``, ``rows``,
    ``choose`` or ``weigh``. It is compiled on the first call, and its code kept on disk."""
    name = f"decode-{work}-{_DIGEST.hexdigest()[:32]}"
    made = c_function(_WORK[work], "void(int64)", lambda function: keep(function, name))
    _kept.append(made)
    address: int = made.address
    return address


_kept: list[Any] = []  # compiled code goes when the object that has it does
