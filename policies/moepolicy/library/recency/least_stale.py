"""Least-Stale: what this forward pass has not touched goes first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, Same, shares_slots
from moepolicy.steps import Step


class LeastStale(Policy):
    """Evict what this forward pass has not touched, the one loaded first (per layer: as fifo does).

    Least-Stale (SpecMD, arXiv 2602.03921). First loaded, first gone among the stale, so that a
    quiet pass does not cost an expert its slot as under LRU. A pass begins where the layers start
    over. What the pass has touched goes after all else. With a cache per layer it is FIFO: all
    that may go is stale there.
    """

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.loaded = np.zeros(context.n_keys, np.int64)
        self.touched = np.full(context.n_keys, -1, np.int64)  # the pass that touched it last
        self.passes = np.zeros(2, np.int64)  # the pass in progress, and its latest layer

    @classmethod
    def same_as(cls, context: Context) -> Same | None:
        """FIFO in a cache per layer."""
        equal = context.scope == "layer" and not shares_slots(cls)
        if (same := super().same_as(context)) is None and equal:
            same = Same("fifo", "a pass comes to a layer once, and all that may go there is stale")
        return same

    def on_step(self, step: Step) -> None:
        """A new pass begins where the layers start over."""
        if step.layer <= self.passes[1]:
            self.passes[0] += 1
        self.passes[1] = step.layer

    def on_hit(self, key: int, now: int) -> None:
        """Note that this pass touched the key."""
        self.touched[key] = self.passes[0]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that this pass touched the key, and the time of the load."""
        self.touched[key] = self.passes[0]
        self.loaded[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate loaded first of those that this pass has not touched, else of all."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            fresh = self.touched[key] == self.passes[0]
            best_fresh = self.touched[best] == self.passes[0]
            if fresh < best_fresh or (fresh == best_fresh and self.loaded[key] < self.loaded[best]):
                best = key
        return int(best)
