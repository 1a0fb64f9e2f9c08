"""LLVM code that multiplies 16 rows of a matrix in blocks by a few tokens, for numba to compile.

numba has no type for a vector of bytes and does not know the instruction that sums products of
bytes, so this code is written in LLVM's own terms. Where the processor has no such instruction,
the same sums are made of ordinary vector operations: the results are equal.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from moepolicy.numba_internals import counted, external, members, variable
from numba import types
from numba.extending import intrinsic

from moerun.format.precision import TILE_ROWS

WEIGHTS_A_SCALE = 32  # weights that share a scale

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(ir.HalfType(), TILE_ROWS)
_FLOATS = ir.VectorType(ir.FloatType(), TILE_ROWS)
_INTS = ir.VectorType(_INT, TILE_ROWS)
_BYTES = ir.VectorType(_BYTE, 4 * TILE_ROWS)

VNNI = bool(binding.get_host_cpu_features().get("avx512vnni", False))
"""Whether this CPU sums products of bytes in one instruction (AVX512_VNNI)."""


def _typed(kind: Any) -> Any:
    """address -> pointer to ``kind``, as `numba.carray` takes it."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(_typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), code

    return pointer


longs, floats = _typed(types.int64), _typed(types.float32)
ints, signed_bytes = _typed(types.int32), _typed(types.int8)
shorts = _typed(types.uint16)


@intrinsic  # type: ignore[untyped-decorator]
def claim(_typing: Any, address: Any) -> Any:
    """The counter at an address, which becomes one more."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, _LONG(1), "monotonic")

    return types.int64(address), code


def _sum_products(builder: Any, sums: Any, codes: Any, x: Any) -> Any:
    """sums[i] + the products of four unsigned codes and four signed values, for each of 16."""
    if VNNI:
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        name = "llvm.x86.avx512.vpdpbusd.512"
        function = external(builder, kind, name)
        return builder.call(function, [sums, builder.bitcast(codes, _INTS), x])
    wide = ir.VectorType(_INT, 4 * TILE_ROWS)
    products = builder.mul(
        builder.zext(codes, wide), builder.sext(builder.bitcast(x, _BYTES), wide)
    )
    for part in range(4):
        every = ir.Constant(_INTS, [4 * i + part for i in range(TILE_ROWS)])
        sums = builder.add(sums, builder.shuffle_vector(products, products, every))
    return sums


def _multiply_add(builder: Any, one: Any, two: Any, three: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = external(builder, kind, f"llvm.fma.v{TILE_ROWS}f32")
    return builder.call(function, [one, two, three])


def _everywhere(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    undefined = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * TILE_ROWS))


class _TileCode:
    """The code that multiplies 16 rows by a number of tokens."""

    def __init__(self, builder: Any, bits: int, tokens: int, values: Any) -> None:
        self.b, self.bits, self.tokens = builder, bits, tokens
        codes, scales, groups, x, x_scales, x_sums, x_stride, out, out_stride = values
        self.codes, self.scales, self.groups = codes, scales, groups
        self.x, self.x_scales, self.x_sums, self.x_stride = x, x_scales, x_sums, x_stride
        self.out, self.out_stride = out, out_stride

    def _at(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.b.inttoptr(self.b.add(base, offset), kind.as_pointer())

    def _token(self, token: int, stride: Any) -> Any:
        return self.b.mul(_LONG(token), stride)

    def emit(self) -> None:
        b = self.b
        floats = [variable(b, _FLOATS) for _ in range(self.tokens)]
        for each in floats:
            b.store(ir.Constant(_FLOATS, [0.0] * TILE_ROWS), each)
        with counted(b, self.groups) as loop:
            self._group(loop.index, floats)
        for token, each in enumerate(floats):
            to = self._at(self.out, self._token(token, self.out_stride), _FLOATS)
            b.store(b.load(each), to, align=4)

    def _group(self, group: Any, floats: list[Any]) -> None:
        b, n = self.b, self.tokens
        word = b.mul(group, _LONG(4))
        sums_stride = b.mul(self.groups, _LONG(4))
        at = [b.add(word, self._token(t, sums_stride)) for t in range(n)]
        sums = [
            _everywhere(b, b.load(self._at(self.x_sums, at[t], _INT), align=4), _INTS)
            for t in range(n)
        ]
        for four, codes in enumerate(self._unpacked(group)):
            for t in range(n):
                x = b.add(b.mul(group, _LONG(WEIGHTS_A_SCALE)), self._token(t, self.x_stride))
                place = self._at(self.x, b.add(x, _LONG(4 * self._order(four))), _INT)
                x = _everywhere(b, b.load(place, align=4), _INTS)
                sums[t] = _sum_products(b, sums[t], codes, x)
        halves = b.load(self._at(self.scales, b.mul(group, _LONG(2 * TILE_ROWS)), _HALVES), align=2)
        scales = b.fpext(halves, _FLOATS)
        for t in range(n):
            x_scale = b.load(self._at(self.x_scales, at[t], ir.FloatType()), align=4)
            scale = b.fmul(scales, _everywhere(b, x_scale, _FLOATS))
            value = b.sitofp(sums[t], _FLOATS)
            b.store(_multiply_add(b, value, scale, b.load(floats[t])), floats[t])

    def _order(self, four: int) -> int:
        """Which four columns the codes that are unpacked at this place have."""
        return four if self.bits == 8 else four // 2 + 4 * (four % 2)

    def _unpacked(self, group: Any) -> Any:
        b = self.b
        n_bytes = TILE_ROWS * WEIGHTS_A_SCALE * self.bits // 8
        base = b.add(self.codes, b.mul(group, _LONG(n_bytes)))
        for place in range(n_bytes // (4 * TILE_ROWS)):
            packed = b.load(self._at(base, _LONG(4 * TILE_ROWS * place), _BYTES), align=4)
            if self.bits == 8:
                yield packed
                continue
            yield b.and_(packed, ir.Constant(_BYTES, [15] * 4 * TILE_ROWS))
            words = b.lshr(b.bitcast(packed, _INTS), ir.Constant(_INTS, [4] * TILE_ROWS))
            high = b.and_(words, ir.Constant(_INTS, [0x0F0F0F0F] * TILE_ROWS))
            yield b.bitcast(high, _BYTES)


def tile_of(bits: int, tokens: int) -> Any:
    """What multiplies 16 rows by so many tokens. Its argument is a tuple of int64: the addresses of
    codes and scales, the number of blocks of a row, the addresses of activations, their scales and
    sums, a token's bytes of activations, and the address and a token's bytes of the results."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_typing: Any, words: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            given = members(builder, values[0])
            _TileCode(builder, bits, tokens, given).emit()
            return context.get_dummy_value()

        return types.void(words), code

    return tile
