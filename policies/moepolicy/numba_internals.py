"""What this project uses of numba and numba does not document: its private names, in one place.

They were read in numba 0.68. `tests/policies/test_numba_internals.py` says which of them a newer
numba no longer has. Importing this imports nothing of numba; each function does when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

READ_IN = "0.68"
"""The numba whose source the names below were read in."""

NAMES = (
    "numba.core.caching.CompileResultCacheImpl",
    "numba.core.caching.FunctionCache._impl_class",
    "numba.core.caching.FunctionCache.load_overload",
    "numba.core.caching.FunctionCache.save_overload",
    "numba.core.ccallback.CFunc",
    "numba.core.cgutils.alloca_once",
    "numba.core.cgutils.alloca_once_value",
    "numba.core.cgutils.for_range",
    "numba.core.cgutils.get_or_insert_function",
    "numba.core.cgutils.if_unlikely",
    "numba.core.cgutils.int32_t",
    "numba.core.cgutils.intp_t",
    "numba.core.cgutils.unpack_tuple",
    "numba.core.registry.cpu_target.target_context",
    "numba.core.runtime.rtsys.initialize",
    "numba.core.sigutils.normalize_signature",
    "numba.core.typing.signature",
    "numba.core.typing.templates.AbstractTemplate",
    "numba.core.typing.templates.AttributeTemplate",
    "numba.core.typing.templates.infer_getattr",
    "numba.core.typing.templates.make_overload_method_template",
    "numba.np.arrayobj.populate_array",
)
"""What is imported. ``dispatcher._cache`` and ``template._resolve`` are used besides."""

NO_ALLOCATION = "_nrt"  # the option of njit that says whether code may make arrays
NEEDS_ALLOCATION = "NRT required"  # what numba says of code that makes arrays and must not


def start_allocator() -> None:
    """Have compiled code be able to make arrays in this process; once or more often."""
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys

    rtsys.initialize(cpu_target.target_context)


def keep_in(
    folder: Callable[[], Path],
    name: str,
    dispatcher: Any,
    used: Callable[[], None],
    saved: Callable[[], None],
    compiling: Callable[[], bool] | None = None,
) -> None:
    """Have ``dispatcher`` look for its code in ``folder`` under ``name`` before it compiles it, and
    leave it there; ``used`` is called when it was found, ``compiling`` before it is compiled,
    ``saved`` after that. An answer True of ``compiling`` says that another process may have left
    the code there meanwhile. Where a file cannot be read or written, code is compiled each time.
    """
    from numba.core.caching import CompileResultCacheImpl, FunctionCache

    class Locator:
        def get_cache_path(self) -> str:
            return str(folder())

        def ensure_cache_path(self) -> None:
            folder().mkdir(parents=True, exist_ok=True)

        def get_source_stamp(self) -> str:
            return name

    class Implementation(CompileResultCacheImpl):  # type: ignore[misc]
        def __init__(self, py_func: Any) -> None:
            self._lineno = py_func.__code__.co_firstlineno
            self._locator = Locator()
            self._filename_base = name

    class KeptCode(FunctionCache):  # type: ignore[misc]
        _impl_class = Implementation

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            found = self._load(sig, target_context)
            if found is None and compiling is not None and compiling():
                found = self._load(sig, target_context)
                if found is not None:
                    saved()
            return found

        def _load(self, sig: Any, target_context: Any) -> Any:
            try:
                found = super().load_overload(sig, target_context)
            except Exception:  # a damaged file: whatever unpickling it may raise
                found = None
                with suppress(OSError):  # saving would read it once more
                    (folder() / f"{name}.nbi").unlink(missing_ok=True)
            if found is not None:
                with suppress(OSError):  # a folder that can only be read
                    used()
            return found

        def save_overload(self, sig: Any, data: Any) -> None:
            with suppress(OSError):
                super().save_overload(sig, data)
            with suppress(OSError):
                saved()

    dispatcher._cache = KeptCode(dispatcher.py_func)


def c_function(function: Callable[..., Any], signature: str, keep: Callable[[Any], None]) -> Any:
    """``function`` compiled as C's functions are called; its ``address`` is there at once.

    ``keep`` is given what looks for the code before it is compiled, as `keep_in` takes it. What
    `numba.cfunc` does, but that numba keeps the code of those in a place of its own.
    """
    from numba.core.ccallback import CFunc
    from numba.core.sigutils import normalize_signature

    options = {"nopython": True, "nogil": True, "error_model": "numpy"}
    made: Any = CFunc(function, normalize_signature(signature), locals={}, options=options)
    made.py_func = function
    keep(made)
    made.compile()
    return made


def resolve_method(kind: Any, name: str, overload: Callable[..., Any]) -> None:
    """Have ``state.name(...)`` be what ``overload`` gives, for types of class ``kind``, which have
    ``fields``, and a field of that name stay a field.

    What numba's ``overload_method`` does, but that another class may have a field of the name.
    """
    from numba.core.typing.templates import infer_getattr, make_overload_method_template
    from numba.extending import overload as overloaded

    template: Any = make_overload_method_template(kind, name, overload, inline="never")
    resolve = template._resolve

    def of_this_class(self: Any, typ: Any, attr: str) -> Any:
        return None if attr in typ.fields else resolve(self, typ, attr)

    template._resolve = of_this_class
    infer_getattr(template)
    overloaded(overload)(overload)


# Of code that is written in LLVM's own terms, for an intrinsic of numba's.


def counted(builder: Any, n: Any) -> AbstractContextManager[Any]:
    """A loop from 0 to ``n``, whose ``index`` is in what the context gives."""
    from numba.core.cgutils import for_range

    loop: AbstractContextManager[Any] = for_range(builder, n)
    return loop


def variable(builder: Any, kind: Any) -> Any:
    """A pointer to memory of the function for a value of ``kind``."""
    from numba.core.cgutils import alloca_once

    return alloca_once(builder, kind)


def external(builder: Any, kind: Any, name: str) -> Any:
    """The function ``name`` of type ``kind``, such as one of LLVM's own."""
    from numba.core.cgutils import get_or_insert_function

    return get_or_insert_function(builder.module, kind, name)


def members(builder: Any, value: Any) -> Any:
    """The values of a tuple."""
    from numba.core.cgutils import unpack_tuple

    return unpack_tuple(builder, value)


# Of `moepolicy.numba_structs`: what numba's documented interface for extensions leaves out.


class Method(NamedTuple):
    """A method of a type of ours: the type it gives, and the code of a call."""

    result: Callable[[Any, Any, tuple[Any, ...]], Any]  # of self, typing context, arguments
    code: Callable[..., Any]  # of context, builder, signature (self first), values


def get_attributes(
    kind: type, field: Callable[[Any, str], Any], method: Callable[[Any, str], Method | None]
) -> None:
    """Have numba ask for the type of a ``field`` of a ``kind``, and for a ``method``; None where
    there is none."""
    from numba import types
    from numba.core.typing import signature
    from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr
    from numba.extending import lower_builtin

    def call(of: Any, attribute: str, how: Method) -> Any:
        class MethodCall(AbstractTemplate):  # type: ignore[misc]
            key = kind, attribute

            def generic(self, args: Any, kws: Any) -> Any:
                if kws:
                    return None
                return signature(how.result(of, self.context, args), *args, recvr=of)

        return types.BoundFunction(MethodCall, of)

    @cache
    def lower(attribute: str) -> None:
        @lower_builtin((kind, attribute), kind, types.VarArg(types.Any))  # type: ignore[untyped-decorator]
        def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            how = method(sig.args[0], attribute)
            assert how is not None
            return how.code(context, builder, sig, args)

    class Attributes(AttributeTemplate):  # type: ignore[misc]
        key = kind

        def generic_resolve(self, of: Any, attribute: str) -> Any:
            found = field(of, attribute)
            if found is not None:
                return found
            how = method(of, attribute)
            if how is None:
                return None
            lower(attribute)
            return call(of, attribute, how)

    infer_getattr(Attributes)


def word_at(builder: Any, table: Any, at: int) -> Any:
    """A pointer to word ``at`` of a table."""
    from numba.core.cgutils import int32_t, intp_t

    words = builder.bitcast(table, intp_t.as_pointer())
    return builder.gep(words, [int32_t(at)], inbounds=True)


def invariant_load(builder: Any, pointer: Any) -> Any:
    """What lies at ``pointer``, of which LLVM may assume that it never changes."""
    value = builder.load(pointer)
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def array_at(context: Any, builder: Any, kind: Any, table: Any, at: int) -> Any:
    """The array whose address, shape and strides are the words from ``at`` on."""
    from numba.np.arrayobj import populate_array

    item = context.get_data_type(kind.dtype)
    words = [invariant_load(builder, word_at(builder, table, at + i)) for i in range(1 + kind.ndim)]
    itemsize = words[0].type(context.get_abi_sizeof(item))
    if kind.layout == "C":  # strides that LLVM can compute with
        strides = [itemsize]
        for extent in reversed(words[2:]):
            strides.insert(0, builder.mul(strides[0], extent, flags=["nsw"]))
    else:
        first = at + 1 + kind.ndim
        strides = [
            invariant_load(builder, word_at(builder, table, first + i)) for i in range(kind.ndim)
        ]
    array = context.make_array(kind)(context, builder)
    populate_array(
        array,
        data=builder.inttoptr(words[0], item.as_pointer()),
        shape=words[1:],
        strides=strides,
        itemsize=itemsize,
        meminfo=None,
    )
    return array._getvalue()


def call_address(context: Any, builder: Any, address: Any, sig: Any, values: Sequence[Any]) -> Any:
    """Call the compiled function of signature ``sig`` at ``address`` as numba calls its own; what
    it raises, the caller raises."""
    from numba.core.cgutils import if_unlikely

    convention = context.call_conv
    result, arguments = sig.return_type, sig.args
    kind = convention.get_function_type(result, arguments)
    function = builder.inttoptr(address, kind.as_pointer())
    status, value = convention.call_function(builder, function, result, arguments, values)
    with if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)
    return value


def call_or_default(builder: Any, address: Any, default: Any, call: Callable[[], Any]) -> Any:
    """What ``call`` gives where ``address`` is not 0; else ``default``, a value."""
    from numba.core.cgutils import alloca_once_value

    found = alloca_once_value(builder, default)
    with builder.if_then(builder.icmp_signed("!=", address, address.type(0))):
        builder.store(call(), found)
    return builder.load(found)


def raise_at_zero(context: Any, builder: Any, address: Any, message: str) -> None:
    """Raise NotImplementedError where ``address`` is 0."""
    from numba.core.cgutils import if_unlikely

    with if_unlikely(builder, builder.icmp_signed("==", address, address.type(0))):
        context.call_conv.return_user_exc(builder, NotImplementedError, (message,))


def wrapper_address(context: Any, builder: Any, kind: Any, sig: Any, wanted: Any) -> Any:
    """The address of a function of signature ``wanted`` that calls the dispatcher of type ``kind``,
    of signature ``sig``."""
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core.cgutils import intp_t

    convention = context.call_conv
    result, arguments = wanted.return_type, wanted.args
    code = convention.get_function_type(result, arguments)
    name = f"{builder.function.name}.{len(builder.module.globals)}"
    wrapper = ir.Function(builder.module, code, name)
    wrapper.linkage = "internal"
    inside = ir.IRBuilder(wrapper.append_basic_block())
    values = convention.decode_arguments(inside, arguments, wrapper)
    function = context.get_function(kind, sig)
    context.add_linking_libs(getattr(function, "libs", ()))
    value = function(inside, values)
    if str(result) == "none":
        value = context.get_dummy_value()
    else:
        value = context.cast(inside, value, sig.return_type, result)
    convention.return_value(inside, value)
    return builder.ptrtoint(wrapper, intp_t)
