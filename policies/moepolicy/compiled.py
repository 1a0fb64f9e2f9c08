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
from moepolicy.inplace import Store, stores
from moepolicy.numba_internals import resolve_method, start_allocator
from moepolicy.policy import HOOKS, Policy
from moepolicy.reasons import needs_memory
from moepolicy.twins import OPTIONS, inner, twin

PLAIN = (np.ndarray, np.generic, bool, int, float)

_entries: dict[str, Any] = {}
_allocating: set[type[Policy]] = set()  # classes whose code makes arrays


def compiled(
    function: Callable[..., Any], state: Any, *, omit: frozenset[FunctionType] = frozenset()
) -> Callable[..., Any]:
    """The compiled twin of a plain function, and of all it calls, for one policy's ``state``.

    ``state`` is what ``compiled_policy`` gives. ``omit`` are functions that the caller knows will
    not be reached: leaving them out makes compiling faster, and what is compiled too. Compiling
    takes place on the first call, unless an earlier run has left the code on disk.
    """
    import numba

    name = file_name(function, state, omit)
    if name not in _entries:
        assert isinstance(function, FunctionType)
        if _allocates(state):
            start_allocator()
        _entries[name] = numba.njit(twin(function, omit, False), **OPTIONS)
        keep(_entries[name], name)
    return _entries[name]  # type: ignore[no-any-return]


def is_compiled(
    function: Callable[..., Any], policy: Policy, *, omit: frozenset[FunctionType] = frozenset()
) -> bool:
    """Whether an earlier run has left what ``compiled`` makes for ``policy`` on disk.

    Where that makes arrays, it is compiled so from now on. Raises NotCompilable.
    """
    return in_either_form(
        policy, lambda: is_kept(file_name(function, compiled_policy(policy), omit))
    )


def in_either_form(policy: Policy, is_there: Callable[[], bool]) -> bool:
    """Whether code ``is_there`` for ``policy``: as it is compiled now, or such that it may make
    arrays, which it may then from now on."""
    if is_there():
        return True
    classes = classes_of(policy) - _allocating
    _allocating.update(classes)
    if is_there():
        return True
    _allocating.difference_update(classes)
    return False


def allow_memory(policy: Policy, error: BaseException) -> bool:
    """Whether ``error``, of compiling ``policy``, was that its code makes arrays and must not.

    It may from now on: compiling it once more is worth a try.
    """
    classes = classes_of(policy)
    if classes <= _allocating or not needs_memory(error):
        return False
    _allocating.update(classes)
    return True


def classes_of(policy: Policy) -> set[type[Policy]]:
    """The classes of a policy and of those it is made of."""
    parts = [value for value in vars(policy).values() if isinstance(value, Policy)]
    return {type(policy)}.union(*map(classes_of, parts))


def file_name(function: Callable[..., Any], state: Any, omit: frozenset[FunctionType]) -> str:
    """The name under which `compiled` keeps its code."""
    classes = _policy_classes(state)
    memory = "-memory" if _allocates(state) else ""
    digest = _digest(function, classes, omit)
    return f"{function.__name__}-{classes[0].__name__}{memory}-{digest}"


@cache
def _digest(
    function: Callable[..., Any], classes: tuple[type[Policy], ...], omit: frozenset[FunctionType]
) -> str:
    assert isinstance(function, FunctionType)
    return fingerprint(function, classes, omit)


class NotCompilable(TypeError):
    """A policy that must run interpreted, and why."""


def compiled_policy(policy: Policy) -> Any:
    """``policy`` as compiled code takes it. It shares the policy's arrays: state stays in sync.

    Raises NotCompilable where an attribute is neither an array nor a number nor such a policy, or
    where a hook assigns it.
    """
    values = {
        name: compiled_policy(value) if isinstance(value, Policy) else value
        for name, value in attributes_of(policy).items()
    }
    cls: Any = type(policy)
    return _state_class(cls, tuple(values), cls in _allocating)(**values)


def attributes_of(policy: Policy) -> dict[str, Any]:
    """The arrays, numbers and policies that compiled code finds in ``policy``, by name.

    Raises NotCompilable where there is anything else, or where a hook assigns one.
    """
    _refuse_stores(policy)
    for name, value in vars(policy).items():
        if not isinstance(value, (Policy, *PLAIN)):
            raise NotCompilable(
                f"{type(policy).__name__}.{name} is a {type(value).__name__}, neither an array nor "
                "a number"
            )
    own = {name: getattr(policy, name) for name in ("staging", "stage_prefetches", "fills_slots")}
    return vars(policy) | {name: own[name] for name in own if name not in vars(policy)}


def makes_arrays(cls: type[Policy]) -> bool:
    """Whether a class's code is compiled such that it may make arrays."""
    return cls in _allocating


def _refuse_stores(policy: Policy) -> None:
    """NotCompilable where a hook assigns an attribute, for compiled code could not."""
    cls: Any = type(policy)
    for store in _stores(cls):
        value = getattr(policy, store.attribute, None)
        if not (store.in_place and isinstance(value, np.ndarray) and value.ndim):
            raise NotCompilable(
                f"{type(policy).__name__}.{store.method} assigns '{store.attribute}' (line "
                f"{store.line}): keep what changes in the entries of an array"
            )


@cache
def _stores(cls: Any) -> list[Store]:
    return stores(cls, HOOKS)


def _allocates(state: Any) -> bool:
    """Whether the policy that ``state`` stands for, or one that it is made of, makes arrays."""
    parts = [value for value in state if hasattr(type(value), "policy_class")]
    return bool(type(state).allocating) or any(map(_allocates, parts))


def _policy_classes(state: Any) -> tuple[type[Policy], ...]:
    """The classes of a policy and of those it is made of."""
    parts = [value for value in state if hasattr(type(value), "policy_class")]
    return (type(state).policy_class, *(cls for part in parts for cls in _policy_classes(part)))


@cache
def _state_class(cls: Any, fields: tuple[str, ...], allocating: bool) -> Any:
    """The named tuple that stands for a policy's ``self`` in compiled code."""
    state = namedtuple(cls.__name__, fields)  # type: ignore[misc]
    state.policy_class = cls  # type: ignore[attr-defined]
    state.allocating = allocating  # type: ignore[attr-defined]
    # Code on disk refers to the class by name.
    names = cls.__module__, cls.__qualname__, *fields, *(["memory"] if allocating else [])
    state.__qualname__ = "_".join(names).replace(".", "_")
    state.__module__ = __name__
    globals()[state.__qualname__] = state
    for name in dir(cls):
        if not name.startswith("__") and isinstance(getattr(cls, name), FunctionType):
            _resolve_method(name)
    return state


@cache
def _resolve_method(name: str) -> None:
    """Teach numba that ``state.name(...)`` is the policy class's method of that name."""
    import numba

    def overload(state: Any, *args: Any) -> Any:  # noqa: ARG001  numba matches the arguments
        cls = getattr(state.instance_class, "policy_class", None)
        if cls is None:
            return None
        method = inner(getattr(cls, name), frozenset(), state.instance_class.allocating)

        def call(state: Any, *args: Any) -> Any:
            return method(state, *args)

        return call

    resolve_method(numba.types.NamedTuple, name, overload)
