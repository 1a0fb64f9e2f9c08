"""Numba's type for a named tuple or a policy that lies in memory as a table of words.

Compiled code is given the table's address: one pointer goes from function to function, where a
tuple of fifty arrays would be copied. Importing this imports numba.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature
from typing import Any

import numpy as np
from numba import TypingError, types
from numba.extending import (
    NativeValue,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from moepolicy.numba_internals import (
    Method,
    array_at,
    call_address,
    call_or_default,
    get_attributes,
    invariant_load,
    raise_at_zero,
    word_at,
    wrapper_address,
)


class StructType(types.Type):  # type: ignore[misc]
    """A table of words: a number or an address each, but for an array its address and extent.

    ``fields`` are names and numba types. ``is_a`` names the policy class whose methods the table
    has; "" is none, ``BY_ADDRESS`` those whose functions' addresses are entries of the table.
    """

    def __init__(
        self, title: str, fields: Iterable[tuple[str, Any]], is_a: str = "", memory: bool = False
    ) -> None:
        pairs = tuple(fields)
        self.fields = tuple(name for name, _ in pairs)
        self.types = tuple(kind for _, kind in pairs)
        self.is_a = is_a
        self.memory = memory  # whether the class's code makes arrays
        of = ", ".join(f"{name}: {kind}" for name, kind in pairs)
        super().__init__(name=f"{title}[{is_a}{' with memory' if memory else ''}]({of})")

    def place(self, attribute: str) -> tuple[int, Any]:
        """The first word of a field, and the field's type."""
        at = 0
        for name, kind in zip(self.fields, self.types, strict=True):
            if name == attribute:
                return at, kind
            at += n_words(kind)
        raise AttributeError(attribute)


BY_ADDRESS = "by address"


def n_words(kind: Any) -> int:
    """How many words a field of this type takes."""
    return 1 + 2 * kind.ndim if isinstance(kind, types.Array) else 1


class Struct:
    """A table, and what it refers to: arrays, which must not be replaced while code has it."""

    def __init__(self, kind: StructType, words: list[int], kept: Any) -> None:
        self.kind = kind
        self._words = np.array(words, np.int64)
        self._kept = kept
        self.address = self._words.ctypes.data


def struct_of(
    title: str,
    values: dict[str, Any],
    *,
    is_a: str = "",
    memory: bool = False,
    writable: bool = False,
    kept: Any = None,
) -> Struct:
    """``values`` (arrays, numbers and structs) as a table.

    ``writable``: arrays are taken for writable, so that types do not depend on where arrays come
    from. ``kept`` lives as long as the table. OverflowError where a whole number needs more than
    64 bits.
    """
    fields, words = [], []
    for name, value in values.items():
        fields.append((name, _type_of(value, writable)))
        words += _words_of(value)
    return Struct(StructType(title, fields, is_a, memory), words, [kept, *values.values()])


def _type_of(value: Any, writable: bool) -> Any:
    if isinstance(value, Struct):
        return value.kind
    # An integer's type follows its size in numba, and code is kept for one type.
    for plain, kind in ((bool, types.boolean), (int, types.int64), (float, types.float64)):
        if isinstance(value, plain):
            return kind
    found = typeof_impl(value, None)
    return found.copy(readonly=False) if writable and isinstance(value, np.ndarray) else found


def _words_of(value: Any) -> list[int]:
    if isinstance(value, Struct):
        return [value.address]
    if isinstance(value, np.ndarray):
        return [value.ctypes.data, *value.shape, *value.strides]
    word = np.zeros(1, np.int64)
    number = np.array([value], np.int64 if type(value) is int else None)
    word.view(np.uint8)[: number.nbytes] = number.view(np.uint8)
    return word.tolist()


@register_model(StructType)
class _Model(models.OpaqueModel):  # type: ignore[misc]
    pass


@typeof_impl.register(Struct)  # type: ignore[untyped-decorator]
def _typeof(value: Struct, _: Any) -> StructType:
    return value.kind


@unbox(StructType)  # type: ignore[untyped-decorator]
def _unbox(kind: StructType, value: Any, c: Any) -> NativeValue:
    address = c.pyapi.object_getattr_string(value, "address")
    word = c.pyapi.long_as_longlong(address)
    c.pyapi.decref(address)
    return NativeValue(c.builder.inttoptr(word, c.context.get_value_type(kind)))


def _field(kind: StructType, attribute: str) -> Any:
    return dict(zip(kind.fields, kind.types, strict=True)).get(attribute)


_find_method: list[Callable[[StructType, str], Method | None]] = []


def _method(kind: StructType, attribute: str) -> Method | None:
    return _find_method[0](kind, attribute)


get_attributes(StructType, _field, _method)


def find_methods_by(find: Callable[[StructType, str], Method | None]) -> None:
    """Have ``find`` say what a method of a struct is."""
    _find_method[:] = [find]


@lower_getattr_generic(StructType)  # type: ignore[untyped-decorator]
def _load_field(context: Any, builder: Any, kind: StructType, table: Any, attribute: str) -> Any:
    at, found = kind.place(attribute)
    if isinstance(found, types.Array):
        return array_at(context, builder, found, table, at)
    if isinstance(found, StructType):
        word = invariant_load(builder, word_at(builder, table, at))
        return builder.inttoptr(word, context.get_value_type(found))
    stored = context.get_data_type(found).as_pointer()
    value = invariant_load(builder, builder.bitcast(word_at(builder, table, at), stored))
    return context.data_model_manager[found].from_data(builder, value)


def method_of(dispatcher: Any) -> Method:
    """A compiled function that takes the struct first."""
    kind = types.Dispatcher(dispatcher)

    def signature(typing: Any, arguments: tuple[Any, ...]) -> Any:
        return typing.resolve_function_type(kind, arguments, {})

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        inner = signature(context.typing_context, sig.args)
        function = context.get_function(kind, inner)
        context.add_linking_libs(getattr(function, "libs", ()))
        return function(builder, args)

    return Method(lambda of, typing, args: signature(typing, (of, *args)).return_type, code)


def method_by_address(entry: str, own: str, sig: Any, default: Any) -> Method:
    """The function whose address is entry ``entry`` of a table, and which takes in the table's
    place the struct at entry ``own``. At address 0: ``default``; for ..., NotImplementedError.
    """

    def code(context: Any, builder: Any, given: Any, args: Any) -> Any:
        table = given.args[0]
        address = invariant_load(builder, word_at(builder, args[0], table.place(entry)[0]))
        state = invariant_load(builder, word_at(builder, args[0], table.place(own)[0]))

        def call() -> Any:
            values = [builder.inttoptr(state, args[0].type), *args[1:]]
            return _call(context, builder, address, sig, given.args, values)

        if default is ...:
            raise_at_zero(context, builder, address, f"there is no {entry}")
            return call()
        if default is None:
            return call_or_default(builder, address, context.get_dummy_value(), call)
        constant = context.get_constant(sig.return_type, default)
        return call_or_default(builder, address, constant, call)

    return Method(lambda _, __, ___: sig.return_type, code)


def calling(entry: str, sig: Any, which: int) -> Any:
    """Compiled: a call of the function whose address is entry ``entry`` of the table that is the
    ``which``-th argument."""

    def call(_: Any, *given: Any) -> Any:
        at = given[which].place(entry)[0]

        def code(context: Any, builder: Any, found: Any, args: Any) -> Any:
            address = invariant_load(builder, word_at(builder, args[which], at))
            return _call(context, builder, address, sig, found.args, args)

        return sig.return_type(*given), code

    # Numba counts an intrinsic's parameters.
    names = ["typing", *(f"argument_{i}" for i in range(len(sig.args)))]
    parameters = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in names]
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(call)


def _call(context: Any, builder: Any, address: Any, sig: Any, given: Any, values: Any) -> Any:
    typed = zip(values, given, sig.args, strict=True)
    wanted = [converted(context, builder, *each) for each in typed]
    return call_address(context, builder, address, sig, wanted)


def converted(context: Any, builder: Any, value: Any, given: Any, wanted: Any) -> Any:
    """A value of one type as one of another: of a tuple, each of its entries."""
    if given == wanted or isinstance(wanted, StructType):
        return value
    if not isinstance(wanted, types.BaseTuple):
        return context.cast(builder, value, given, wanted)
    entries = [
        converted(context, builder, builder.extract_value(value, i), one, other)
        for i, (one, other) in enumerate(zip(given.types, wanted.types, strict=True))
    ]
    return context.make_tuple(builder, wanted, entries)


def storing(functions: Sequence[tuple[Any, Any]]) -> Any:
    """Compiled: writes the addresses of ``functions`` (dispatcher, signature) into an array.

    TypingError where one gives something else than its signature says.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def store(typing: Any, out: Any) -> Any:
        found = []
        for function, wanted in functions:
            kind = types.Dispatcher(function)
            sig = typing.resolve_function_type(kind, wanted.args, {})
            gives = sig.return_type
            if isinstance(wanted.return_type, types.Integer) and not isinstance(
                gives, types.Integer | types.Boolean
            ):
                name = function.py_func.__name__
                raise TypingError(f"{name} gives {gives}, and not a whole number")
            found.append((kind, sig, wanted))

        def code(context: Any, builder: Any, _: Any, args: Any) -> Any:
            data = context.make_array(out)(context, builder, args[0]).data
            for i, each in enumerate(found):
                address = wrapper_address(context, builder, *each)
                builder.store(address, builder.gep(data, [address.type(i)]))
            return context.get_dummy_value()

        return types.none(out), code

    return store
