"""LFRU with a guard for newcomers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class LfruGuard(Policy):
    """LFRU that spares an expert for ``guard`` forward passes after its load, if it can.

    Uses over the passes since the last one, as in ``lfru``; but one that has just come has few
    uses yet, and would be the next to go. Engines of 2026 argue about such guards; this is the
    plainest that keeps their point, and no one engine's. Where all are spared, all may go.
    """

    always_evicts = True

    def __init__(self, context: Context, guard: int = 4) -> None:
        if guard < 1:
            raise PolicyUsageError(f"lfru-guard: guard must be 1 or more, not {guard}")
        self.guard = guard
        self.uses = np.zeros(context.n_keys, np.int64)
        self.used = np.zeros(context.n_keys, np.int64)  # pass of its last use or load
        self.loaded = np.zeros(context.n_keys, np.int64)  # pass of its load
        self.passes = np.zeros(2, np.int64)

    def on_step(self, step: Step) -> None:
        """Count the passes."""
        count_pass(self.passes, step)

    def on_hit(self, key: int, now: int) -> None:
        """Count the use and note its pass."""
        self.uses[key] += 1
        self.used[key] = self.passes[0]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the pass, and count the use that the load is for; a guess is none."""
        if not speculative:
            self.uses[key] += 1
        self.used[key] = self.passes[0]
        self.loaded[key] = self.passes[0]

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """Of the candidates not spared, else of all, the one with the lowest rate of uses."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            if self.sooner(candidates[i], best):
                best = candidates[i]
        return int(best)

    def sooner(self, key: int, other: int) -> bool:
        """Whether ``key`` is to go before ``other``."""
        spared, others = self.is_spared(key), self.is_spared(other)
        if spared != others:
            return others
        # Rates compared without dividing: exact, compiled or not.
        age = self.passes[0] + 1 - self.used[key]
        other_age = self.passes[0] + 1 - self.used[other]
        return bool(self.uses[key] * other_age < self.uses[other] * age)

    def is_spared(self, key: int) -> bool:
        """Whether ``key`` came less than ``guard`` passes ago."""
        return bool(self.passes[0] - self.loaded[key] < self.guard)
