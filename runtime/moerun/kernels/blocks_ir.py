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

from moerun.format.block_scheme import TILE_ROWS, BlockScheme

WEIGHTS_A_SCALE = 32  # that activations of one scale are multiplied by

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(ir.HalfType(), TILE_ROWS)
_FLOATS = ir.VectorType(ir.FloatType(), TILE_ROWS)
_INTS = ir.VectorType(_INT, TILE_ROWS)
_BYTES = ir.VectorType(_BYTE, 4 * TILE_ROWS)
_ROW_BYTES = ir.VectorType(_BYTE, TILE_ROWS)

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

    def __init__(self, builder: Any, scheme: BlockScheme, tokens: int, values: Any) -> None:
        self.b, self.scheme, self.tokens = builder, scheme, tokens
        codes, scales, groups, x, x_scales, x_sums, x_stride, out, out_stride = values
        self.codes, self.scales, self.groups = codes, scales, groups
        self.x, self.x_scales, self.x_sums, self.x_stride = x, x_scales, x_sums, x_stride
        self.out, self.out_stride = out, out_stride
        self._words_stride = builder.mul(groups, _LONG(4))  # of a token's scales of activations

    def _at(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.b.inttoptr(self.b.add(base, offset), kind.as_pointer())

    def _token(self, token: int, stride: Any) -> Any:
        return self.b.mul(_LONG(token), stride)

    def emit(self) -> None:
        b, scheme = self.b, self.scheme
        floats = [variable(b, _FLOATS) for _ in range(self.tokens)]
        for each in floats:
            b.store(ir.Constant(_FLOATS, [0.0] * TILE_ROWS), each)
        if scheme.scales == "half":
            with counted(b, self.groups) as loop:
                at = b.mul(loop.index, _LONG(2 * TILE_ROWS))
                halves = b.load(self._at(self.scales, at, _HALVES), align=2)
                self._group(loop.index, [b.fpext(halves, _FLOATS)], None, floats)
        else:
            self._blocks(floats)
        for token, each in enumerate(floats):
            to = self._at(self.out, self._token(token, self.out_stride), _FLOATS)
            b.store(b.load(each), to, align=4)

    def _blocks(self, floats: list[Any]) -> None:
        """Blocks of several groups, whose scales are unpacked first."""
        b, scheme = self.b, self.scheme
        in_one = scheme.block // WEIGHTS_A_SCALE
        n_scales = scheme.sums_a_group
        scales = variable(b, ir.ArrayType(_FLOATS, in_one * n_scales))
        least = variable(b, ir.ArrayType(_FLOATS, in_one)) if scheme.scales == "pairs" else None
        with counted(b, b.sdiv(self.groups, _LONG(in_one))) as blocks:
            unpack = _unpack_pairs if scheme.scales == "pairs" else _unpack_bytes
            at = b.mul(blocks.index, _LONG(TILE_ROWS * scheme.scale_bytes))
            for to, values in zip((scales, least), unpack(b, b.add(self.scales, at)), strict=True):
                for number, value in enumerate(values):
                    b.store(value, b.gep(to, [_INT(0), _INT(number)]))
            with counted(b, _LONG(in_one)) as groups:
                first = b.mul(groups.index, _LONG(n_scales))
                places = [b.add(first, _LONG(n)) for n in range(n_scales)]
                held = [b.load(b.gep(scales, [_LONG(0), place])) for place in places]
                off = b.load(b.gep(least, [_LONG(0), groups.index])) if least else None
                group = b.add(b.mul(blocks.index, _LONG(in_one)), groups.index)
                self._group(group, held, off, floats)

    def _group(self, group: Any, scales: list[Any], least: Any, floats: list[Any]) -> None:
        """Add the products of 32 columns to ``floats``. The scales are of equal parts of these
        columns; ``least`` is what is taken off each weight, or None."""
        b, n = self.b, self.tokens
        at = [b.add(b.mul(group, _LONG(4)), self._token(t, self._words_stride)) for t in range(n)]
        sums = self._sums(group, at, len(scales), zeros=least is not None)
        for four, codes in enumerate(self._unpacked(group)):
            column = self._order(four)
            part = column * len(scales) // (WEIGHTS_A_SCALE // 4)
            for t in range(n):
                x = b.add(b.mul(group, _LONG(WEIGHTS_A_SCALE)), self._token(t, self.x_stride))
                place = self._at(self.x, b.add(x, _LONG(4 * column)), _INT)
                x = _everywhere(b, b.load(place, align=4), _INTS)
                sums[t][part] = _sum_products(b, sums[t][part], codes, x)
        for t in range(n):
            x_scale = b.load(self._at(self.x_scales, at[t], ir.FloatType()), align=4)
            for scale, total in zip(scales, sums[t], strict=True):
                scaled = b.fmul(scale, _everywhere(b, x_scale, _FLOATS))
                value = b.sitofp(total, _FLOATS)
                b.store(_multiply_add(b, value, scaled, b.load(floats[t])), floats[t])
            if least is not None:
                whole = b.load(self._at(self.x_sums, at[t], _INT), align=4)
                whole = b.fmul(b.sitofp(whole, ir.FloatType()), x_scale)
                taken = _multiply_add(b, least, _everywhere(b, whole, _FLOATS), b.load(floats[t]))
                b.store(taken, floats[t])

    def _sums(self, group: Any, at: list[Any], parts: int, *, zeros: bool) -> list[list[Any]]:
        """What the sums of each token begin with: minus what codes of a weight of 0 add."""
        b = self.b
        if zeros:
            return [[ir.Constant(_INTS, [0] * TILE_ROWS)] for _ in at]
        found = []
        for each in at:
            places = [b.add(b.mul(each, _LONG(parts)), _LONG(4 * part)) for part in range(parts)]
            words = [b.load(self._at(self.x_sums, place, _INT), align=4) for place in places]
            found.append([_everywhere(b, word, _INTS) for word in words])
        return found

    def _order(self, four: int) -> int:
        """Which four columns the codes that are unpacked at this place have."""
        return four if self.scheme.bits == 8 else four // 2 + 4 * (four % 2)

    def _unpacked(self, group: Any) -> Any:
        b, scheme = self.b, self.scheme
        low_bytes = TILE_ROWS * WEIGHTS_A_SCALE * (scheme.bits - scheme.high_bits) // 8
        n_bytes = TILE_ROWS * WEIGHTS_A_SCALE * scheme.bits // 8
        base = b.add(self.codes, b.mul(group, _LONG(n_bytes)))
        at = range(0, n_bytes, 4 * TILE_ROWS)
        held = [b.load(self._at(base, _LONG(place), _BYTES), align=4) for place in at]
        n_low = low_bytes // (4 * TILE_ROWS)
        high = [b.bitcast(each, _INTS) for each in held[n_low:]]
        for place, packed in enumerate(held[:n_low]):
            if scheme.bits == 8:
                yield packed
                continue
            words = b.bitcast(packed, _INTS)
            for half in range(2):
                code = self._masked(words, 4 * half, 15)
                if high:
                    code = b.or_(code, self._high(high, self._order(2 * place + half)))
                yield b.bitcast(code, _BYTES)

    def _high(self, held: list[Any], four: int) -> Any:
        """The bits from the fifth on of the codes of four columns, in their place."""
        bits = self.scheme.high_bits
        word, field = divmod(four, 8 // bits)
        return self._masked(held[word], bits * field - 4, ((1 << bits) - 1) << 4)

    def _masked(self, words: Any, right: int, mask: int) -> Any:
        """Each byte of ``words`` moved right by so many bits (left where negative) and masked."""
        b = self.b
        if right:
            by = ir.Constant(_INTS, [abs(right)] * TILE_ROWS)
            words = b.lshr(words, by) if right > 0 else b.shl(words, by)
        return b.and_(words, ir.Constant(_INTS, [mask * 0x01010101] * TILE_ROWS))


def _bytes_of_rows(b: Any, base: Any, number: int) -> Any:
    place = b.inttoptr(b.add(base, _LONG(number)), _ROW_BYTES.as_pointer())
    return b.load(place, align=1)


def _halves_of_rows(b: Any, base: Any, number: int) -> Any:
    place = b.inttoptr(b.add(base, _LONG(2 * TILE_ROWS * number)), _HALVES.as_pointer())
    return b.fpext(b.load(place, align=2), _FLOATS)


def _unpack_pairs(b: Any, base: Any) -> tuple[list[Any], list[Any]]:
    """Scales and least weights of 16 rows' blocks of Q4_K and Q5_K (``get_scale_min_k4`` of
    ggml-quants.c)."""
    step, offset = _halves_of_rows(b, base, 0), _halves_of_rows(b, base, 1)
    held = [_bytes_of_rows(b, base, TILE_ROWS * (4 + n)) for n in range(12)]

    def constant(value: int) -> Any:
        return ir.Constant(_ROW_BYTES, [value] * TILE_ROWS)

    def upper(code: Any) -> Any:
        return b.shl(b.lshr(code, constant(6)), constant(4))

    low = [b.and_(code, constant(63)) for code in held[:8]]
    high = [b.and_(code, constant(15)) for code in held[8:]]
    steps = [*low[:4], *(b.or_(high[n], upper(held[n])) for n in range(4))]
    above = [b.lshr(code, constant(4)) for code in held[8:]]
    offsets = [*low[4:], *(b.or_(above[n], upper(held[4 + n])) for n in range(4))]
    scales = [b.fmul(step, b.uitofp(code, _FLOATS)) for code in steps]
    return scales, [b.fmul(offset, b.uitofp(code, _FLOATS)) for code in offsets]


def _unpack_bytes(b: Any, base: Any) -> tuple[list[Any], list[Any]]:
    """Scales of 16 rows' blocks of Q6_K."""
    step = _halves_of_rows(b, base, 0)
    held = [_bytes_of_rows(b, base, TILE_ROWS * (2 + n)) for n in range(16)]
    return [b.fmul(step, b.sitofp(code, _FLOATS)) for code in held], []


def tile_of(scheme: BlockScheme, tokens: int) -> Any:
    """What multiplies 16 rows by so many tokens. Its argument is a tuple of int64: the addresses of
    codes and scales, the number of groups of a row, the addresses of activations, their scales and
    sums, a token's bytes of activations, and the address and a token's bytes of the results."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_typing: Any, words: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            given = members(builder, values[0])
            _TileCode(builder, scheme, tokens, given).emit()
            return context.get_dummy_value()

        return types.void(words), code

    return tile
