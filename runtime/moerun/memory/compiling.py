"""Compiled calls for a live cache: made by a thread, and taken into use between two calls."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

from moepolicy import ExpertCache, Policy
from moepolicy.blame import files_of
from moepolicy.compiled import NotCompilable
from moepolicy.console import say
from moepolicy.reasons import why_not

COMPILE_AFTER_S = 20.0
"""How long a run must last before what serves every policy is compiled for it: that takes some ten
seconds, and most of the interpreter. Code that an earlier run left on disk is taken at once, and
with that there, a policy's own code, which takes less than a second, is compiled at once."""


class Compiling(Enum):
    """What may be done to have compiled calls: each takes more memory than the one before."""

    NEVER = "never"
    KEPT = "kept"  # load what an earlier run has left on disk
    ALWAYS = "always"  # and compile where none has

    @property
    def rank(self) -> int:
        """Place in the order of memory taken: 0 takes none."""
        return list(Compiling).index(self)


class Told:
    """Remembers which policies it was said of that their calls are not compiled, to say it once."""

    def __init__(self) -> None:
        self._policies: set[type[Policy]] = set()

    def tell(self, policy: type[Policy], name: str, reason: str) -> None:
        """Say on stderr that ``policy`` runs interpreted, unless that has been said."""
        if policy not in self._policies:
            self._policies.add(policy)
            say(f"policy '{name}' runs interpreted: {reason}")


TOLD_IN_THIS_PROCESS = Told()
"""Of all sessions of the process: a bench or a comparison opens one for each run of a policy, and
says of each policy once that it runs interpreted."""


class BackgroundCompiler:
    """Brings one cache its compiled calls; until then, and without them, it runs interpreted."""

    def __init__(
        self,
        cache: ExpertCache,
        lock: AbstractContextManager[Any],
        horizon: int,
        allowed: Compiling = Compiling.ALWAYS,
        told: Told = TOLD_IN_THIS_PROCESS,
    ) -> None:
        """``lock`` is held for every call of the cache; steps have ``horizon`` predictions at
        most. ``allowed`` is KEPT or ALWAYS. ``told`` says why the policy is not compiled."""
        self._told = told
        self._cache = cache
        self._lock = lock
        self._horizon = horizon
        self._allowed = allowed
        self._closing = threading.Event()
        self._beginning = threading.Lock()
        self.taken = Compiling.NEVER
        """What the process has spent memory for, or is about to: code is not unloaded again."""
        self._at_once = threading.Event()
        self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Compile at once, where compiling is allowed, and wait for the compiled calls."""
        self._at_once.set()
        self._thread.join()

    def give_up(self) -> Compiling:
        """Begin nothing more. Returns what has begun, which goes on."""
        with self._beginning:
            self._closing.set()
        self._at_once.set()
        return self.taken

    def close(self) -> None:
        """Give up what has not begun; wait for what has, which must not outlive the interpreter."""
        self._closing.set()
        self._at_once.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            lacks = self._cache.lacks()
            kept = not any(lacks)
            if not kept and self._allowed is Compiling.KEPT:
                return
            if not lacks.nothing_general:
                self._at_once.wait(COMPILE_AFTER_S)
            with self._beginning:
                if self._closing.is_set():
                    return
                self.taken = Compiling.KEPT if kept else Compiling.ALWAYS
            calls = self._cache.compile_calls(self._horizon)
            with self._lock:
                self._cache.use(calls)
        except NotCompilable as error:
            self._tell(str(error))
        except Exception as error:  # numba's own, of many classes
            self._tell(why_not(error, files_of(type(self._cache.policy))))

    def _tell(self, reason: str) -> None:
        """Say once why a policy's calls are not compiled; they serve as they are."""
        self._told.tell(type(self._cache.policy), self._cache.name, reason)


class Compilation:
    """Brings each cache of a session its compiled calls, as far as that is allowed."""

    def __init__(
        self,
        cache: ExpertCache,
        lock: AbstractContextManager[Any],
        horizon: int,
        allowed: Compiling,
    ) -> None:
        """The arguments are those of `BackgroundCompiler`, but that ``allowed`` may be NEVER."""
        self._cache = cache
        self._lock = lock
        self._horizon = horizon
        self._allowed = allowed
        self._before = Compiling.NEVER  # for earlier caches
        self._compiler = self._begin()

    @property
    def done(self) -> Compiling:
        """What memory has been spent for, or is about to be, over all caches."""
        begun = self._compiler.taken if self._compiler else Compiling.NEVER
        return max(begun, self._before, key=lambda each: each.rank)

    def allow(self, allowed: Compiling) -> Compiling:
        """Do no more than ``allowed`` from now on. Returns what has been done, which stays."""
        with self._lock:
            if self._compiler and self._compiler.give_up() is Compiling.NEVER:
                self._compiler = None
            done = self.done
            self._allowed = max(allowed, done, key=lambda each: each.rank)
            if self._compiler is None:
                self._compiler = self._begin()
            return done

    def renew(self, cache: ExpertCache) -> BackgroundCompiler | None:
        """Begin again for ``cache``. Returns what worked for the one before, to be closed once
        the lock, which is held now, is not."""
        self._cache, self._before = cache, self.done
        former, self._compiler = self._compiler, self._begin()
        return former

    def finish(self) -> None:
        """Wait until the calls are compiled, where they can be and are to be."""
        if self._compiler:
            self._compiler.finish()

    def close(self) -> None:
        """Give up compilations that have not begun, and wait for those that have."""
        if self._compiler:
            self._compiler.close()

    def _begin(self) -> BackgroundCompiler | None:
        if self._allowed is Compiling.NEVER:
            return None
        return BackgroundCompiler(self._cache, self._lock, self._horizon, self._allowed)
