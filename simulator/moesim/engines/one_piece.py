"""Replay, state machine and policy compiled into one piece: for long sweeps, while the run goes on.

It runs two to three times as fast as code that calls a policy by address, and compiling it takes
ten to twenty seconds. So another process does that, and the run changes over between two chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

from moepolicy import Policy, PolicySpec, machine
from moepolicy.codecache import code_folder
from moepolicy.compiled import compiled, compiled_policy, file_name, is_compiled

from moesim.engines import replay as twin
from moesim.engines.compile_process import CompileProcess

ONE_PIECE = "one-piece"  # what `moesim.ahead` calls it
COMPILING_S = 120.0  # after this another process may try what one has begun

Omit = frozenset[FunctionType]


class Pieces:
    """Which policies' pieces a command has, or has begun to compile."""

    def __init__(self) -> None:
        self._trusted: dict[tuple[type[Policy], Omit], bool] = {}
        self._begun: dict[tuple[type[Policy], Omit], CompileProcess | None] = {}

    def ready(self, spec: PolicySpec, policy: Policy, omit: Omit, same: Callable[[], bool]) -> bool:
        """Whether the piece of ``policy`` without the functions of ``omit`` can be used from now
        on; has it compiled if it is nowhere. ``same`` says whether it does what the interpreter
        does, and is asked once."""
        key = spec.policy, omit
        if key not in self._trusted and is_compiled(twin.replay, policy, omit=omit):
            self._trusted[key] = same()
        elif key not in self._trusted and key not in self._begun:
            self._begun[key] = _begin(spec, policy, omit)
        return self._trusted.get(key, False)


def piece(policy: Policy, omit: Omit) -> tuple[Callable[..., Any], Any]:
    """The replay compiled with ``policy``, and what it takes in the policy's place."""
    state = compiled_policy(policy)
    return compiled(twin.replay, state, omit=omit), state


def named(names: str) -> Omit:
    """The functions that `_begin` told another process to leave out."""
    every = vars(machine) | vars(twin)
    return frozenset(every[name] for name in names.split(",") if name)


def _begin(spec: PolicySpec, policy: Policy, omit: Omit) -> CompileProcess | None:
    """Have another process compile it, unless one does so already."""
    lock = code_folder() / f"{file_name(twin.replay, compiled_policy(policy), omit)}.lock"
    with suppress(OSError):
        # Of a lock from the future, after a jump of the clock, nothing is known.
        if lock.exists() and 0 <= time.time() - lock.stat().st_mtime < COMPILING_S:
            return None
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    names = ",".join(sorted(each.__name__ for each in omit))
    return CompileProcess([ONE_PIECE, spec.label, names])
