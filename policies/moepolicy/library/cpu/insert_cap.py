"""A cap on how many experts a token may bring into the cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.library.passes import count_pass
from moepolicy.library.selection import lowest
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class InsertCap(Policy):
    """LRU that loads at most ``cap`` missing experts a forward pass; the CPU computes the others.

    The cap on insertions a token that llama.cpp's users ask for (#27861): copies then never hold a
    token up for longer than ``cap`` of them take. A pass takes them in the order of its misses:
    the first layers' first, of a layer the heaviest first.
    """

    requires = frozenset({"cpu"})
    always_evicts = True

    def __init__(self, context: Context, cap: int = 4) -> None:
        if cap < 0:
            raise PolicyUsageError(f"insert-cap: cap must be 0 or more, not {cap}")
        self.cap = cap
        self.used = np.zeros(context.n_keys, np.int64)
        self.passes = np.zeros(2, np.int64)
        self.inserted = np.zeros(2, np.int64)  # the pass counted, and its loads so far

    def on_step(self, step: Step) -> None:
        """Count from 0 where a pass begins."""
        now = count_pass(self.passes, step)
        if now != self.inserted[0]:
            self.inserted[0] = now
            self.inserted[1] = 0

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load as a use."""
        self.used[key] = now

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD until the pass has had its loads, then COMPUTE."""
        if self.inserted[1] >= self.cap:
            return COMPUTE
        self.inserted[1] += 1
        return LOAD

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose last use is longest ago."""
        return lowest(self.used, candidates)
