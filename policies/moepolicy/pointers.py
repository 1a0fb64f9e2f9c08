"""Compile the state machine and an engine once for all policies, and a policy's hooks apart.

The engine calls the state machine's functions, and those call a policy's hooks, by addresses that
are entries of a table. The table, the cache and a policy's attributes are tables of words in memory
(`moepolicy.numba_structs`): no code but a policy's own hooks depends on the policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache as once
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from moepolicy.codecache import is_kept, keep
from moepolicy.compiled import NotCompilable, attributes_of, in_either_form, makes_arrays
from moepolicy.composite import MadeOfTwo
from moepolicy.fingerprint import class_fingerprint, fingerprint
from moepolicy.numba_internals import start_allocator
from moepolicy.policy import HOOKS, Policy
from moepolicy.signatures import (
    EVERY,
    MACHINE,
    ORDER,
    ROUTING,
    TABLE,
    default_answer,
    entry,
    hook_signature,
    interface,
    machine_signature,
    table_names,
    table_type,
)
from moepolicy.state import Cache
from moepolicy.twins import OPTIONS, Apart, inner, twin

_entries: dict[str, Any] = {}
_classes: dict[str, Any] = {}  # by the name that a struct's type has for its policy's class


class Linked(NamedTuple):
    """A cache and a policy as code takes them that is compiled once for all policies.

    Their arrays must not be replaced while such code runs.
    """

    cache: Any
    policy: Any  # the table of addresses


def link(cache: Cache, policy: Policy) -> Linked:
    """Compile ``policy``'s hooks, and the state machine, or load what an earlier run has left.

    Raises NotCompilable, or numba's own errors, where the policy is beyond compiling.
    """
    from moepolicy.numba_structs import BY_ADDRESS, struct_of

    linked = pointed(cache)
    state, by_name = compile_hooks(policy)
    for part in _parts(cache):
        by_name |= _addresses_of_machine(linked.kind, part)
    values = {"state": state.address} | {
        entry(name): by_name.get(name, 0) for name in table_names()
    }
    return Linked(linked, struct_of(TABLE, values, is_a=BY_ADDRESS, kept=state))


def compile_hooks(policy: Policy) -> tuple[Any, dict[str, int]]:
    """``policy``'s attributes as its hooks' code takes them, and the addresses of the hooks it has.

    Raises NotCompilable, or numba's own errors, where the policy is beyond compiling.
    """
    state = _state_of(policy)
    hooks = tuple(hook for hook in ORDER if _answers(policy, hook))
    return state, dict(zip(hooks, _addresses_of_hooks(state.kind, hooks), strict=True))


def compile_machine(cache: Cache) -> None:
    """Compile the state machine, or load what an earlier run has left."""
    for part in _parts(cache):
        _addresses_of_machine(pointed(cache).kind, part)


def _parts(cache: Cache) -> list[tuple[Any, ...]]:
    """The parts of the state machine that a cache needs."""
    return [MACHINE, ROUTING] if cache.routing else [MACHINE]


def unlinked(cache: Cache) -> Linked:
    """A cache with a table of no addresses, to compile an engine with that is given no steps."""
    from moepolicy.numba_structs import BY_ADDRESS, struct_of

    values = dict.fromkeys(table_type().fields, 0)
    return Linked(pointed(cache), struct_of(TABLE, values, is_a=BY_ADDRESS))


def engine(function: Callable[..., Any], linked: Linked) -> Callable[..., Any]:
    """The compiled twin of a function that drives ``linked``'s cache, for any policy.

    Compiling takes place on the first call, unless an earlier run has left the code on disk.
    """
    assert isinstance(function, FunctionType)
    name = _engine_name(function, linked.cache.kind)
    if name not in _entries:
        _teach_numba()
        made = twin(function, frozenset(), False, _apart(linked.cache.kind))
        _keep(made, name, tell=True)
    return _entries[name]  # type: ignore[no-any-return]


def pointed(values: Any) -> Any:
    """A named tuple of arrays and numbers, for code that is compiled once for all policies."""
    from moepolicy.numba_structs import struct_of

    title = type(values).__name__
    return struct_of(title, values._asdict(), writable=True, kept=values)


class Missing(NamedTuple):
    """What of a run's code an earlier one has not left on disk."""

    machine: bool
    engine: bool
    hooks: bool

    @property
    def nothing_general(self) -> bool:
        """Whether all that serves every policy is there."""
        return not (self.machine or self.engine)


def missing(function: Callable[..., Any], cache: Cache, policy: Policy) -> Missing:
    """What ``link`` and ``engine`` would have to compile. Raises NotCompilable.

    Where a policy's hooks make arrays, they are compiled so from now on.
    """
    assert isinstance(function, FunctionType)
    kind = pointed(cache).kind
    hooks = tuple(hook for hook in ORDER if _answers(policy, hook))
    return Missing(
        not all(_is_there(_machine_name(kind, part)) for part in _parts(cache)),
        not _is_there(_engine_name(function, kind)),
        not in_either_form(policy, lambda: _is_there(_hooks_name(_state_of(policy).kind, hooks))),
    )


def _is_there(name: str) -> bool:
    return name in _entries or is_kept(name)


def _answers(policy: Policy, hook: str) -> bool:
    """Whether ``policy`` does anything in a hook."""
    own = getattr(type(policy), hook)
    if isinstance(policy, MadeOfTwo) and own is getattr(MadeOfTwo, hook):
        return any(_answers(part, hook) for part in policy.parts)
    return own is not getattr(Policy, hook)


def _name(title: str, *parts: Any) -> str:
    digest = hashlib.sha256("\n".join(map(str, (interface(), *parts))).encode())
    return f"{title}-{digest.hexdigest()[:32]}"


def _keep(function: FunctionType, name: str, *, tell: bool = False) -> None:
    import numba

    _entries[name] = numba.njit(function, **OPTIONS)
    keep(_entries[name], name, tell=tell)


def _addresses(name: str, functions: Callable[[], list[tuple[Any, Any]]], n: int) -> list[int]:
    """The addresses of ``n`` compiled functions (dispatcher, signature), whose code is kept
    together under ``name``."""
    from moepolicy.numba_structs import storing

    if name not in _entries:
        # A global and no closure's variable, which numba would have in the key of what it keeps.
        given = {"_store": storing(functions()), "__name__": __name__}
        made = FunctionType(_write_addresses.__code__, given, "addresses")
        _keep(made, name, tell=name.startswith("machine-"))
    out = np.zeros(n, np.int64)
    _entries[name](out)
    return out.tolist()


def _write_addresses(out: Any) -> None:
    _store(out)  # type: ignore[name-defined]  # noqa: F821


@once
def _machine_name(cache_kind: Any, part: tuple[Any, ...]) -> str:
    title = f"machine-{part[0].__name__}"
    return _name(title, cache_kind, *(fingerprint(f, (Policy,), frozenset()) for f in part))


@once
def _addresses_of_machine(cache_kind: Any, part: tuple[Any, ...]) -> dict[str, int]:
    _teach_numba()

    def functions() -> list[tuple[Any, Any]]:
        return [
            (inner(function, frozenset(), False, ()), machine_signature(function, cache_kind))
            for function in part
        ]

    found = _addresses(_machine_name(cache_kind, part), functions, len(part))
    return dict(zip([function.__name__ for function in part], found, strict=True))


def _hooks_name(state_kind: Any, hooks: tuple[str, ...]) -> str:
    return _name(f"hooks-{_classes[state_kind.is_a].__name__}", state_kind, hooks)


@once
def _addresses_of_hooks(state_kind: Any, hooks: tuple[str, ...]) -> list[int]:
    if state_kind.memory:
        start_allocator()
    _teach_numba()
    cls = _classes[state_kind.is_a]

    def functions() -> list[tuple[Any, Any]]:
        found = []
        for hook in hooks:
            method = inner(getattr(cls, hook), frozenset(), state_kind.memory)
            found.append((method, hook_signature(hook, state_kind)))
        return found

    return _addresses(_hooks_name(state_kind, hooks), functions, len(hooks))


def _engine_name(function: FunctionType, cache_kind: Any) -> str:
    return _name(function.__name__, cache_kind, fingerprint(function, (Policy,), frozenset(EVERY)))


@once
def _apart(cache_kind: Any) -> Apart:
    """How an engine calls the state machine."""
    from moepolicy.numba_structs import calling

    found = []
    for function in EVERY:
        sig = machine_signature(function, cache_kind)
        which = sig.args.index(table_type())
        found.append((function, calling(entry(function.__name__), sig, which)))
    return tuple(found)


def _state_of(policy: Policy) -> Any:
    """A policy's attributes as a table, whose type has its class's methods."""
    from moepolicy.numba_structs import struct_of

    values = {
        name: _state_of(value) if isinstance(value, Policy) else value
        for name, value in attributes_of(policy).items()
    }
    cls: Any = type(policy)
    try:
        return struct_of(cls.__name__, values, is_a=_class_name(cls), memory=makes_arrays(cls))
    except OverflowError:
        raise NotCompilable(
            f"{cls.__name__} has a whole number of more than 64 bits: "
            f"{', '.join(name for name, value in values.items() if _is_long(value))}"
        ) from None


def _is_long(value: Any) -> bool:
    return type(value) is int and not -(1 << 63) <= value < 1 << 63


@once
def _class_name(cls: Any) -> str:
    """A name that another class has only if its code is the same."""
    name = f"{cls.__module__}.{cls.__qualname__} {class_fingerprint(cls)}"
    _classes[name] = cls
    return name


@once
def _teach_numba() -> None:
    """Teach numba what ``state.name(...)`` is: the policy class's method of that name, or of the
    table the hook whose address is its entry."""
    from moepolicy.numba_structs import find_methods_by

    find_methods_by(_method)


@once
def _method(kind: Any, name: str) -> Any:
    from moepolicy.numba_structs import BY_ADDRESS, method_by_address, method_of

    if kind.is_a == BY_ADDRESS:
        if name not in HOOKS:
            return None
        return method_by_address(
            entry(name), "state", hook_signature(name, kind), default_answer(name)
        )
    function = getattr(_classes.get(kind.is_a), name, None)
    if not isinstance(function, FunctionType):
        return None
    return method_of(inner(function, frozenset(), kind.memory))
