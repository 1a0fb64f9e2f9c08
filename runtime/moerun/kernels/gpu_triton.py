# mypy: ignore-errors
# Triton compiles these functions; their arguments are pointers, numbers and tl.constexpr.
"""The Triton kernels behind `moerun.kernels.gpu`: one for a single token, one for many.

Packed codes lie as `bitplanes.pack_codes` leaves them: blocks of 64 rows, column by column, 32
bytes each, byte b holding row b in its low half and row b + 32 in its high one; below 4 bits in
planes.

The two kernels are long functions: what is cut out of one is compiled into it all the same, and
takes the loop's state as arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(128)  # of 8 codes each: what a program for one token has of a column
COLUMNS = tl.constexpr(64)  # of one tile for many tokens: the largest group
_STEP = tl.constexpr(16)  # columns whose loads are under way together: the smallest group
# An integer below 2**23 in the last bits of this float32 is that float plus the integer.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def _ranges(ranges, at, inside, meta_groups, scale_unit, META_GROUP: tl.constexpr):
    """Step and least of the 64 scales that begin at ``at``, then of the zeros: in float32.

    64 rows never cross from one group of 128 into the next.
    """
    first = ranges + at // META_GROUP
    scale_step = tl.load(first, mask=inside, other=0.0).to(tl.float32) * scale_unit
    scale_least = tl.load(first + meta_groups, mask=inside, other=0.0).to(tl.float32) * scale_unit
    zero_step = tl.load(first + 2 * meta_groups, mask=inside, other=0.0).to(tl.float32)
    zero_least = tl.load(first + 3 * meta_groups, mask=inside, other=0.0).to(tl.float32)
    return scale_step, scale_least, zero_step, zero_least


@triton.jit
def _planes(codes, high, begins, offset, inside, half, BITS: tl.constexpr, ONES: tl.constexpr):
    """Nibbles at ``begins + offset`` of their whole order, of ``2 * half`` elements, in the width
    that ``codes`` points to; ONES has the lowest bit of each nibble set.

    The plane is chosen by ``begins`` alone, so that loads along ``offset`` are seen to be wide.
    """
    if BITS == 4:
        return tl.load(codes + begins + offset, mask=inside, other=0)
    second = begins >= half
    within = tl.where(second, begins - half, begins)
    plane = tl.load(codes + within + offset, mask=inside, other=0)
    nibbles = tl.where(second, plane >> 2, plane) & (3 * ONES)
    if BITS == 3:
        odd = within >= half // 2
        within = tl.where(odd, within - half // 2, within)
        turn = (second * 2 + odd).to(plane.dtype)
        top = tl.load(high + within + offset, mask=inside, other=0)
        nibbles |= ((top >> turn) & ONES) << 2
    return nibbles


@triton.jit
def _byte(words, PLACE: tl.constexpr):
    """Byte PLACE of each word in float32."""
    return (((words >> (8 * PLACE)) & 255) | _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC


@triton.jit
def _summed(total, words, x, PLACE: tl.constexpr):
    """total + code x x, by the codes in nibble PLACE of the words."""
    codes = (((words >> (4 * PLACE)) & 15) | _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC
    return total + codes * x


@triton.jit
def _scaled(total, part, x_sum, scales, zeros, step, PLACE: tl.constexpr):
    """total + scale x (part - zero x x_sum), by the scales and zeros in byte PLACE of the words."""
    scale_step, scale_least, zero_step, zero_least = step
    scale = _byte(scales, PLACE) * scale_step + scale_least
    zero = _byte(zeros, PLACE) * zero_step + zero_least
    return total + scale * (part - zero * x_sum)


@triton.jit
def multiply_one(
    x,
    codes,
    high,
    scales,
    zeros,
    ranges,
    out,
    rows,
    columns,
    span,
    meta_groups,
    scale_unit,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PASSES: tl.constexpr,
    META_GROUP: tl.constexpr,
):
    """out[split, N] = W[N, K] x[K] over a span of columns; codes, scales, zeros as uint32 words.

    A thread has eight rows for itself and walks along them: group by group it sums codes times x,
    which is exact but for float32's rounding, and applies scale and zero to the sum.
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    block, place = word // 8, word % 8
    inside = block < rows // 64
    split = tl.program_id(1)
    t0 = tl.zeros((WORDS,), dtype=tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    groups = columns // GROUP
    first = split * (span // GROUP)
    for group in range(first, tl.minimum(first + span // GROUP, groups)):
        p0 = tl.zeros((WORDS,), dtype=tl.float32)
        p1, p2, p3, p4, p5, p6, p7 = p0, p0, p0, p0, p0, p0, p0
        x_sum = 0.0
        for begin in range(group * GROUP, group * GROUP + GROUP, _STEP):
            for i in tl.static_range(_STEP):
                xk = tl.load(x + begin + i).to(tl.float32)
                begins = (block * columns + begin + i) * 8
                words = _planes(
                    codes, high, begins, place, inside, rows * columns // 16, BITS, 0x11111111
                )
                x_sum += xk
                p0 = _summed(p0, words, xk, 0)
                p1 = _summed(p1, words, xk, 1)
                p2 = _summed(p2, words, xk, 2)
                p3 = _summed(p3, words, xk, 3)
                p4 = _summed(p4, words, xk, 4)
                p5 = _summed(p5, words, xk, 5)
                p6 = _summed(p6, words, xk, 6)
                p7 = _summed(p7, words, xk, 7)
        turn = group % PASSES * (groups // PASSES) + group // PASSES
        meta = turn * rows + block * 64
        step = _ranges(ranges, meta, inside, meta_groups, scale_unit, META_GROUP)
        at = meta // 4 + place
        s = tl.load(scales + at, mask=inside, other=0)
        z = tl.load(zeros + at, mask=inside, other=0)
        t0 = _scaled(t0, p0, x_sum, s, z, step, 0)
        t2 = _scaled(t2, p2, x_sum, s, z, step, 1)
        t4 = _scaled(t4, p4, x_sum, s, z, step, 2)
        t6 = _scaled(t6, p6, x_sum, s, z, step, 3)
        s = tl.load(scales + at + 8, mask=inside, other=0)
        z = tl.load(zeros + at + 8, mask=inside, other=0)
        t1 = _scaled(t1, p1, x_sum, s, z, step, 0)
        t3 = _scaled(t3, p3, x_sum, s, z, step, 1)
        t5 = _scaled(t5, p5, x_sum, s, z, step, 2)
        t7 = _scaled(t7, p7, x_sum, s, z, step, 3)
    to = out + split * rows + block * 64 + place * 4
    tl.store(to, t0, mask=inside)
    tl.store(to + 1, t2, mask=inside)
    tl.store(to + 2, t4, mask=inside)
    tl.store(to + 3, t6, mask=inside)
    tl.store(to + 32, t1, mask=inside)
    tl.store(to + 33, t3, mask=inside)
    tl.store(to + 34, t5, mask=inside)
    tl.store(to + 35, t7, mask=inside)


@triton.jit
def _weights(codes, scales, zeros, at, inside, step, dtype: tl.constexpr, GROUP: tl.constexpr):
    """(code - zero) x scale, [COLUMNS, 32], of codes[COLUMNS, 32] and the metas[groups, 32] at
    ``at``."""
    scale_step, scale_least, zero_step, zero_least = step
    scale = tl.load(scales + at, mask=inside, other=0).to(tl.float32) * scale_step + scale_least
    zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) * zero_step + zero_least
    grouped = tl.reshape(codes.to(tl.float32), (COLUMNS // GROUP, GROUP, 32))
    weights = (grouped - zero[:, None, :]) * scale[:, None, :]
    return tl.reshape(weights, (COLUMNS, 32)).to(dtype)


@triton.jit
def multiply_many(
    x,
    codes,
    high,
    scales,
    zeros,
    ranges,
    out,
    tokens,
    rows,
    columns,
    span,
    meta_groups,
    scale_unit,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PASSES: tl.constexpr,
    META_GROUP: tl.constexpr,
):
    """out[split, T, N] = x[T, K] W[N, K].T over a span of columns, on tensor cores.

    A program has 64 rows and TOKENS tokens; its weights are rounded to the type of x, as a plain
    matrix would be.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    # In 64 bits: a long prompt through a wide matrix has more outputs than 32 can number.
    t = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    byte = tl.arange(0, 32)
    lower = tl.zeros((TOKENS, 32), dtype=tl.float32)
    upper = tl.zeros((TOKENS, 32), dtype=tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    for begin in range(split * span, tl.minimum(split * span + span, columns), COLUMNS):
        k = begin + tl.arange(0, COLUMNS)
        inside = k < columns
        seen = (t < tokens)[:, None] & inside[None, :]
        xs = tl.load(x + t[:, None] * columns + k[None, :], mask=seen, other=0.0)
        begins = ((block * columns + k) * 32)[:, None]
        half = rows * columns // 4
        both = _planes(codes, high, begins, byte[None, :], inside[:, None], half, BITS, 0x11)
        group = begin // GROUP + tl.arange(0, COLUMNS // GROUP)[:, None]
        known = group < columns // GROUP
        turn = group % PASSES * (columns // GROUP // PASSES) + group // PASSES
        at = turn * rows + block * 64
        step = _ranges(ranges, at, known, meta_groups, scale_unit, META_GROUP)
        at += byte[None, :]
        weights = _weights(both & 15, scales, zeros, at, known, step, dtype, GROUP)
        lower = tl.dot(xs, weights, lower, input_precision="ieee")
        weights = _weights(both >> 4, scales, zeros, at + 32, known, step, dtype, GROUP)
        upper = tl.dot(xs, weights, upper, input_precision="ieee")
    to = out + (split * tokens + t)[:, None] * rows + block * 64 + byte[None, :]
    tl.store(to, lower, mask=(t < tokens)[:, None])
    tl.store(to + 32, upper, mask=(t < tokens)[:, None])
