"""A name for compiled code: a digest of every function and constant that went into it.

numba's own cache looks at one source file. A replay is made of the state machine, an engine and a
policy that may be anybody's, so what counts is what the compiler is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numpy as np

from moepolicy.policy import Policy

Add = Callable[[bytes], None]
MODULES = (
    *("twins", "inplace", "compiled", "pointers", "signatures"),
    *("numba_structs", "numba_internals"),
)
"""The modules here that give numba something else than functions as they stand."""


def fingerprint(
    function: FunctionType, policies: tuple[type[Policy], ...], omit: frozenset[FunctionType]
) -> str:
    """The digest of what compiling ``function`` for such policies comes to, less ``omit``."""
    digest = hashlib.sha256(_compilers())
    seen = set(omit)
    _add_function(digest.update, function, seen)
    for policy in policies:
        _add_class(digest.update, policy, seen)
    digest.update(repr(sorted(each.__qualname__ for each in omit)).encode())
    return digest.hexdigest()[:32]


@cache
def _compilers() -> bytes:
    """What makes code of functions: numba, numpy, and `MODULES`."""
    found = f"numba {version('numba')} numpy {version('numpy')}".encode()
    for name in MODULES:
        found += (Path(__file__).parent / f"{name}.py").read_bytes()
    return found


def class_fingerprint(policy: type[Policy]) -> str:
    """The digest of a policy class's methods, and of what they call."""
    digest = hashlib.sha256(_compilers())
    _add_class(digest.update, policy, set())
    return digest.hexdigest()[:32]


def _add_class(add: Add, policy: type[Policy], seen: set[FunctionType]) -> None:
    add(f"{policy.__module__}.{policy.__qualname__}".encode())
    for name in sorted(dir(policy)):
        method = getattr(policy, name)
        if isinstance(method, FunctionType) and not name.startswith("__"):
            _add_function(add, method, seen)


def _add_function(add: Add, function: FunctionType, seen: set[FunctionType]) -> None:
    add(f"{function.__module__}.{function.__qualname__}".encode())
    if function in seen:
        return
    seen.add(function)
    add(repr(function.__defaults__).encode())
    for annotation in function.__annotations__.values():
        # Compiled code finds a tuple's entries by their places.
        kind = function.__globals__.get(annotation) if isinstance(annotation, str) else annotation
        if isinstance(kind, type) and (fields := getattr(kind, "_fields", ())):
            add(f"{kind.__module__}.{kind.__qualname__} {fields}".encode())
    for name in _add_code(add, function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType):
            _add_function(add, value, seen)
        elif isinstance(value, np.ndarray):
            add(value.tobytes())
        elif isinstance(value, (ModuleType, type)):
            add(f"{name} {value.__name__} {getattr(value, '_fields', '')}".encode())
        else:
            add(f"{name} {value!r}".encode())


def _add_code(add: Add, code: CodeType) -> tuple[str, ...]:
    """Add what ``code`` does, not where it stands; returns the names it looks up."""
    names = code.co_names
    add(code.co_code)
    add(repr((names, code.co_varnames, code.co_cellvars, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _add_code(add, constant)
        else:
            add(repr(constant).encode())
    return names
