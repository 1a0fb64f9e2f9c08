"""What the functions give and take that compiled code calls by address: the hooks of a policy, and
those of the state machine that ask a policy. As their annotations have it, in numba's types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np

from moepolicy.machine import begin, end, finish, start
from moepolicy.policy import HOOKS, Policy
from moepolicy.resize import resize
from moepolicy.routing import RoutingBuffers, reroute
from moepolicy.steps import Step, TokenRows

MACHINE: tuple[Any, ...] = (begin, start, finish, end, resize)
ROUTING: tuple[Any, ...] = (reroute,)
"""The functions of the state machine that a driver calls and that ask the policy. Those about
routing are kept apart, for few policies need them."""

EVERY = MACHINE + ROUTING

NO_DEFAULT = frozenset({"victim"})  # hooks without a sensible answer where a class has none
TWO_DIMENSIONAL = {"Step": {"predicted"}, "TokenRows": {"ids", "weights", "logits"}}
"""Of tuples that compiled code makes, the arrays that are no vectors."""
ORDER = tuple(sorted(HOOKS))

TABLE = "table"


def entry(name: str) -> str:
    """The table's entry for the address of a function of that name."""
    return f"at_{name}"


def table_names() -> list[str]:
    """The functions whose addresses are in the table."""
    return [*ORDER, *(function.__name__ for function in EVERY)]


@once
def table_type() -> Any:
    """The type of the table: the address of a policy's state, and those of functions."""
    from numba import types

    from moepolicy.numba_structs import BY_ADDRESS, StructType

    fields = ["state", *map(entry, table_names())]
    return StructType(TABLE, [(name, types.int64) for name in fields], BY_ADDRESS)


def _kind_of(annotation: str, known: dict[str, Any], ndim: int = 1, read_only: bool = False) -> Any:
    from numba import from_dtype, types

    array = re.fullmatch(r"NDArray\[np\.(\w+)\]", annotation)
    if array:
        dtype = from_dtype(np.dtype(getattr(np, array[1])))
        return types.Array(dtype, ndim, "C", readonly=read_only)
    plain = {"int": types.int64, "bool": types.boolean, "float": types.float64, "None": types.none}
    return (plain | known)[annotation]


@once
def tuple_type(cls: Any, read_only: bool) -> Any:
    """A named tuple as compiled code makes one."""
    from numba import types

    wide = TWO_DIMENSIONAL.get(cls.__name__, ())
    kinds = [
        _kind_of(_text(annotation), {}, 1 + (name in wide), read_only)
        for name, annotation in cls.__annotations__.items()
    ]
    return types.NamedTuple(kinds, cls)


@once
def struct_type(cls: Any) -> Any:
    """What `pointed` makes of a named tuple of vectors and numbers."""
    from moepolicy.numba_structs import StructType

    kind = tuple_type(cls, False)
    return StructType(cls.__name__, zip(kind.fields, kind.types, strict=True))


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else annotation.__forward_arg__


def _signature(function: Callable[..., Any], known: dict[str, Any], *own: Any) -> Any:
    from numba import types

    kinds = dict(function.__annotations__)
    result = _kind_of(kinds.pop("return"), known)
    if result == types.boolean:  # of which numba has one form in memory and another in registers
        result = types.int64
    return result(*own, *(_kind_of(kind, known) for kind in kinds.values()))


@once
def hook_signature(hook: str, own: Any) -> Any:
    """The signature of a hook whose policy is of type ``own``."""
    # A hook cannot be compiled that changes what its step shows.
    return _signature(getattr(Policy, hook), {"Step": tuple_type(Step, True)}, own)


@once
def machine_signature(function: Any, cache_kind: Any) -> Any:
    """The signature of a function of the state machine."""
    known = {
        "Cache": cache_kind,
        "Policy": table_type(),
        "Step": tuple_type(Step, False),
        "TokenRows": tuple_type(TokenRows, False),
        "RoutingBuffers": struct_type(RoutingBuffers),
    }
    return _signature(function, known)


@once
def interface() -> str:
    """All that code has to agree upon with code that it calls by address."""
    table = table_type()
    return (
        f"{table} {[(hook, hook_signature(hook, table), default_answer(hook)) for hook in ORDER]}"
    )


def default_answer(hook: str) -> Any:
    """What a hook answers that a policy has not; ... where there is no answer."""
    if hook in NO_DEFAULT:
        return ...
    function: Any = getattr(Policy, hook)
    answer = function(*[None] * function.__code__.co_argcount)
    return int(answer) if isinstance(answer, bool) else answer
