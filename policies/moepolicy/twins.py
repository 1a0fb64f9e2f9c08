"""A plain function's compiled twin: the same code, calling the twins of what the function calls."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np

from moepolicy.inplace import in_place
from moepolicy.numba_internals import NO_ALLOCATION

# No reference counts: nothing is allocated in a replay, and counting costs 7 times more than the
# work itself. A policy whose code makes arrays is compiled with them, the state machine never.
OPTIONS = {"nogil": True, "error_model": "numpy", NO_ALLOCATION: False}
# Inlined throughout: the state is a tuple of many words, which calls would copy (5 times slower).
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}

# Where the state is a pointer, LLVM may decide.
APART = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

Apart = tuple[tuple[FunctionType, Any], ...]
"""Functions that are called by other means than as twins of theirs, and those means."""

_twins: dict[tuple[FunctionType, frozenset[FunctionType], bool, Apart | None], Any] = {}


def inner(
    function: FunctionType,
    omit: frozenset[FunctionType],
    allocating: bool,
    apart: Apart | None = None,
) -> Any:
    """The compiled twin of a function that only compiled code calls; to be inlined, but where
    there is an ``apart``."""
    import numba

    key = function, omit, allocating, apart
    if key not in _twins:
        options = INNER if apart is None else APART
        _twins[key] = numba.njit(twin(*key), **(options | {NO_ALLOCATION: allocating}))
    return _twins[key]


def twin(
    function: FunctionType,
    omit: frozenset[FunctionType],
    allocating: bool,
    apart: Apart | None = None,
) -> FunctionType:
    """``function`` with twins for what it calls; what is in ``omit`` is never reached, and what is
    in ``apart`` is called as that says. ``allocating``: the code may make arrays."""
    namespace = {name: _wide(value) for name, value in function.__globals__.items()}
    namespace["int"] = np.int64
    # As Python's: of a float32 numba's float makes a float32.
    namespace["float"] = np.float64
    called = dict(apart or ())
    for name in function.__code__.co_names:
        value = namespace.get(name)
        if isinstance(value, FunctionType) and not value.__module__.startswith("numpy"):
            value = NEVER_REACHED if value in omit else value
            namespace[name] = called.get(value) or inner(value, omit, allocating, apart)
    made = FunctionType(in_place(function), namespace, function.__name__)
    made.__defaults__ = function.__defaults__
    return made


def _wide(value: Any) -> Any:
    """One integer type throughout: numba compiles a function for each combination it meets, and
    to numba a constant is a type of its own, as is what ``int`` makes of an int32."""
    return np.int64(value) if type(value) is int else value


UNREACHED = 0


def _never_reached(*_: Any) -> int:
    return UNREACHED


assert isinstance(_never_reached, FunctionType)
NEVER_REACHED: FunctionType = _never_reached
