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

from moepolicy.policy import Policy

PLAIN = (np.ndarray, np.generic, bool, int, float)

_twins: dict[tuple[FunctionType, bool, frozenset[FunctionType]], Any] = {}


def compiled(
    function: Callable[..., Any],
    *,
    entry: bool = True,
    omit: frozenset[FunctionType] = frozenset(),
) -> Callable[..., Any]:
    """The compiled twin of a plain function, and of all it calls; made once, compiled on use.

    ``entry`` makes it callable from Python, which costs compile time that inner functions spare.
    ``omit`` are functions that the caller knows will not be reached: leaving them out makes
    compiling faster, and what is compiled too.
    """
    import numba

    assert isinstance(function, FunctionType)
    twin_key = (function, entry, omit)
    if twin_key not in _twins:
        namespace = dict(function.__globals__)
        twin = FunctionType(function.__code__, namespace, function.__name__)
        twin.__defaults__ = function.__defaults__
        # No reference counts: nothing is allocated in a replay, and counting costs 7 times more
        # than the work itself. Inlined throughout: the state is a tuple of many words, which
        # calls would copy (5 times slower).
        options = {"nogil": True, "error_model": "numpy", "_nrt": False}
        if not entry:
            options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
        _twins[twin_key] = numba.njit(twin, **options)
        for name in function.__code__.co_names:
            value = namespace.get(name)
            if isinstance(value, FunctionType) and not value.__module__.startswith("numpy"):
                replaced = _never_reached if value in omit else value
                namespace[name] = compiled(replaced, entry=False, omit=omit)
    return _twins[twin_key]  # type: ignore[no-any-return]


def _never_reached(*_: Any) -> int:
    return 0


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


@cache
def _state_class(cls: Any, fields: tuple[str, ...]) -> Any:
    """The named tuple that stands for a policy's ``self`` in compiled code."""
    state = namedtuple(cls.__name__, fields)  # type: ignore[misc]
    state.policy_class = cls  # type: ignore[attr-defined]
    for name in dir(cls):
        if not name.startswith("__") and isinstance(getattr(cls, name), FunctionType):
            _resolve_method(name)
    return state


@cache
def _resolve_method(name: str) -> None:
    """Teach numba that ``state.name(...)`` is the policy class's method of that name."""
    from numba import types
    from numba.extending import overload_method

    def overload(state: Any, *args: Any) -> Any:  # noqa: ARG001  numba matches the arguments
        cls = getattr(state.instance_class, "policy_class", None)
        if cls is None:
            return None
        method = compiled(getattr(cls, name), entry=False)

        def call(state: Any, *args: Any) -> Any:
            return method(state, *args)

        return call

    overload_method(types.NamedTuple, name)(overload)
