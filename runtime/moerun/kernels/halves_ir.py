"""LLVM code for rows of bfloat16, for numba to compile, which has no such type.

Sums run in lanes of one width on every processor, so a result does not depend on the processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from moepolicy.numba_internals import counted, external, variable
from numba import types
from numba.extending import intrinsic

LANES = 16
"""What the widths of rows are multiples of."""

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_BYTES = 2 * LANES  # of a vector of bfloat16
_AT_ONCE = 4  # sums side by side: one alone would wait for its last addition


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_typing: Any, _value: Any) -> Any:
    """The bits of a float32, uint32."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _INT)

    return types.uint32(types.float32), code


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_typing: Any, _bits: Any) -> Any:
    """The float32 of such bits."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _FLOAT)

    return types.float32(types.uint32), code


def _at(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _widened(builder: Any, base: Any, offset: Any) -> Any:
    """16 numbers of bfloat16 at an address, as float32."""
    halves = builder.load(_at(builder, base, offset, _HALVES), align=2)
    words = builder.shl(builder.zext(halves, _INTS), ir.Constant(_INTS, [16] * LANES))
    return builder.bitcast(words, _FLOATS)


def _multiply_add(builder: Any, one: Any, two: Any, three: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(external(builder, kind, f"llvm.fma.v{LANES}f32"), [one, two, three])


def _everywhere(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _total(builder: Any, lanes: Any) -> Any:
    """The sum of 16 lanes, by halves."""
    width = LANES // 2
    while width:
        order = [(i + width) % LANES for i in range(LANES)]
        moved = builder.shuffle_vector(lanes, lanes, ir.Constant(_INTS, order))
        lanes, width = builder.fadd(lanes, moved), width // 2
    return builder.extract_element(lanes, _INT(0))


@intrinsic  # type: ignore[untyped-decorator]
def dot_halves(_typing: Any, one: Any, two: Any, width: Any) -> Any:
    """The sum of products, float32, of bfloat16[width] at two addresses."""

    def code(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
        one, two, width = values
        sums = [variable(b, _FLOATS) for _ in range(_AT_ONCE)]
        for each in sums:
            b.store(ir.Constant(_FLOATS, [0.0] * LANES), each)

        def add(offset: Any, into: Any) -> None:
            product = _multiply_add(
                b, _widened(b, one, offset), _widened(b, two, offset), b.load(into)
            )
            b.store(product, into)

        whole = b.udiv(width, _LONG(LANES * _AT_ONCE))
        with counted(b, whole) as loop:
            base = b.mul(loop.index, _LONG(_BYTES * _AT_ONCE))
            for i, each in enumerate(sums):
                add(b.add(base, _LONG(_BYTES * i)), each)
        done = b.mul(whole, _LONG(_BYTES * _AT_ONCE))
        with counted(b, b.urem(b.udiv(width, _LONG(LANES)), _LONG(_AT_ONCE))) as loop:
            add(b.add(done, b.mul(loop.index, _LONG(_BYTES))), sums[0])
        lanes = [b.load(each) for each in sums]
        pairs = b.fadd(lanes[0], lanes[1]), b.fadd(lanes[2], lanes[3])
        return _total(b, b.fadd(*pairs))

    return types.float32(one, two, width), code


@intrinsic  # type: ignore[untyped-decorator]
def add_weighted(
    _typing: Any, weights: Any, rows: Any, row_bytes: Any, n: Any, width: Any, out: Any
) -> Any:
    """Add to float32[width] at ``out`` the ``n`` rows bfloat16[width], each times its weight of
    float32[n]. ``width`` is a multiple of 32."""

    def code(context: Any, b: Any, _signature: Any, values: Any) -> Any:
        weights, rows, row_bytes, n, width, out = values
        pair = [variable(b, _FLOATS) for _ in range(2)]
        with counted(b, b.udiv(width, _LONG(2 * LANES))) as loop:
            column, to = b.mul(loop.index, _LONG(2 * _BYTES)), b.mul(loop.index, _LONG(4 * _BYTES))
            places = [_at(b, out, b.add(to, _LONG(2 * _BYTES * i)), _FLOATS) for i in range(2)]
            for each, place in zip(pair, places, strict=True):
                b.store(b.load(place, align=4), each)
            with counted(b, n) as row:
                at = b.mul(row.index, _LONG(4))
                weight = _everywhere(b, b.load(_at(b, weights, at, _FLOAT), align=4))
                offset = b.add(b.mul(row.index, row_bytes), column)
                for i, each in enumerate(pair):
                    held = _widened(b, rows, b.add(offset, _LONG(_BYTES * i)))
                    b.store(_multiply_add(b, held, weight, b.load(each)), each)
            for each, place in zip(pair, places, strict=True):
                b.store(b.load(each), place, align=4)
        return context.get_dummy_value()

    return types.void(weights, rows, row_bytes, n, width, out), code
