"""Compile the state machine together with a policy, both as they stand, with numba.

A function becomes its twin: the same code object with every plain Python function it names
replaced by that function's twin. A policy becomes a named tuple of its attributes, on which its
class's methods still resolve. numba is only imported here, when something is compiled.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

from moepolicy.codecache import is_kept, keep
from moepolicy.fingerprint import fingerprint
from moepolicy.policy import Policy

PLAIN = (np.ndarray, np.generic, bool, int, float)

# No reference counts: nothing is allocated in a replay, and counting costs 7 times more than the
# work itself.
OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
# Inlined throughout: the state is a tuple of many words, which calls would copy (5 times slower).
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}

_entries: dict[str, Any] = {}
_twins: dict[tuple[FunctionType, frozenset[FunctionType]], Any] = {}


def compiled(
    function: Callable[..., Any], state: Any, *, omit: frozenset[FunctionType] = frozenset()
) -> Callable[..., Any]:
    """The compiled twin of a plain function, and of all it calls, for one policy's ``state``.

    ``state`` is what ``compiled_policy`` gives. ``omit`` are functions that the caller knows will
    not be reached: leaving them out makes compiling faster, and what is compiled too. Compiling
    takes place on the first call, unless an earlier run has left the code on disk.
    """
    import numba

    name = _file_name(function, state, omit)
    if name not in _entries:
        assert isinstance(function, FunctionType)
        _entries[name] = numba.njit(_twin(function, omit), **OPTIONS)
        keep(_entries[name], name)
    return _entries[name]  # type: ignore[no-any-return]


def is_compiled(
    function: Callable[..., Any], state: Any, *, omit: frozenset[FunctionType] = frozenset()
) -> bool:
    """Whether an earlier run has left what ``compiled`` makes on disk."""
    return is_kept(_file_name(function, state, omit))


def _file_name(function: Callable[..., Any], state: Any, omit: frozenset[FunctionType]) -> str:
    classes = _policy_classes(state)
    return f"{function.__name__}-{classes[0].__name__}-{_digest(function, classes, omit)}"


@cache
def _digest(
    function: Callable[..., Any], classes: tuple[type[Policy], ...], omit: frozenset[FunctionType]
) -> str:
    assert isinstance(function, FunctionType)
    return fingerprint(function, classes, omit)


def _inner(function: FunctionType, omit: frozenset[FunctionType]) -> Any:
    """The compiled twin of a function that only compiled code calls."""
    import numba

    if (function, omit) not in _twins:
        _twins[function, omit] = numba.njit(_twin(function, omit), **INNER)
    return _twins[function, omit]


def _twin(function: FunctionType, omit: frozenset[FunctionType]) -> FunctionType:
    namespace = {name: _wide(value) for name, value in function.__globals__.items()}
    namespace["int"] = np.int64
    for name in function.__code__.co_names:
        value = namespace.get(name)
        if isinstance(value, FunctionType) and not value.__module__.startswith("numpy"):
            namespace[name] = _inner(NEVER_REACHED if value in omit else value, omit)
    twin = FunctionType(function.__code__, namespace, function.__name__)
    twin.__defaults__ = function.__defaults__
    return twin


def _wide(value: Any) -> Any:
    """One integer type throughout: numba compiles a function for each combination it meets, and
    to numba a constant is a type of its own, as is what ``int`` makes of an int32."""
    return np.int64(value) if type(value) is int else value


NOTHING = 0


def _never_reached(*_: Any) -> int:
    return NOTHING


assert isinstance(_never_reached, FunctionType)
NEVER_REACHED: FunctionType = _never_reached


class NotCompilable(TypeError):
    """A policy that must run interpreted, and why."""


def compiled_policy(policy: Policy) -> Any:
    """``policy`` as compiled code takes it. It shares the policy's arrays: state stays in sync.

    Raises NotCompilable where an attribute is neither an array nor a number nor such a policy.
    """
    values = {}
    for name, value in vars(policy).items():
        if isinstance(value, Policy):
            values[name] = compiled_policy(value)
        elif isinstance(value, PLAIN):
            values[name] = value
        else:
            raise NotCompilable(f"{type(policy).__name__}.{name} is a {type(value).__name__}")
    for name in ("staging", "stage_prefetches"):
        values.setdefault(name, getattr(policy, name))
    cls: Any = type(policy)
    return _state_class(cls, tuple(values))(**values)


def _policy_classes(state: Any) -> tuple[type[Policy], ...]:
    """The classes of a policy and of those it is made of."""
    parts = [value for value in state if hasattr(type(value), "policy_class")]
    return (type(state).policy_class, *(cls for part in parts for cls in _policy_classes(part)))


@cache
def _state_class(cls: Any, fields: tuple[str, ...]) -> Any:
    """The named tuple that stands for a policy's ``self`` in compiled code."""
    state = namedtuple(cls.__name__, fields)  # type: ignore[misc]
    state.policy_class = cls  # type: ignore[attr-defined]
    # Code on disk refers to the class by name.
    state.__qualname__ = "_".join((cls.__module__, cls.__qualname__, *fields)).replace(".", "_")
    state.__module__ = __name__
    globals()[state.__qualname__] = state
    for name in dir(cls):
        if not name.startswith("__") and isinstance(getattr(cls, name), FunctionType):
            _resolve_method(name)
    return state


@cache
def _resolve_method(name: str) -> None:
    """Teach numba that ``state.name(...)`` is the policy class's method of that name.

    What numba's ``overload_method`` does, but that another class may have a field of the name.
    """
    from numba import types
    from numba.core.typing.templates import infer_getattr, make_overload_method_template
    from numba.extending import overload as overloaded

    def overload(state: Any, *args: Any) -> Any:  # noqa: ARG001  numba matches the arguments
        cls = getattr(state.instance_class, "policy_class", None)
        if cls is None:
            return None
        method = _inner(getattr(cls, name), frozenset())

        def call(state: Any, *args: Any) -> Any:
            return method(state, *args)

        return call

    template: Any = make_overload_method_template(types.NamedTuple, name, overload, inline="never")
    resolve = template._resolve

    def of_this_class(self: Any, typ: Any, attr: str) -> Any:
        return None if attr in typ.fields else resolve(self, typ, attr)

    template._resolve = of_this_class
    infer_getattr(template)
    overloaded(overload)(overload)
