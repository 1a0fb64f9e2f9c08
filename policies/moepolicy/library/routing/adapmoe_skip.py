"""AdapMoE's gating: a missing second expert of little weight is left out."""

from __future__ import annotations

import math

import numpy as np

from moepolicy.kinds import LOAD, SKIP
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step


class AdapmoeSkip(Lru):
    """LRU that leaves out a missing second expert of little weight (AdapMoE, 2408.10284).

    AdapMoE runs one expert where the second one's weight is below sqrt(0.005 / s), with s the
    layer's sensitivity to it: here ``sensitivity``, for all layers, and only where the expert is
    missing, as one that is there costs no load. Weights count as shares of the token's. Of the
    paper neither the prefetching nor the sharing of slots among layers is part of it.
    """

    requires = frozenset({"weights"})
    lossy = True

    def __init__(self, context: Context, sensitivity: float = 0.125) -> None:
        if sensitivity <= 0:
            raise PolicyUsageError(f"adapmoe-skip: sensitivity must be above 0, not {sensitivity}")
        self.eviction_score = np.zeros(context.n_keys, np.int64)
        self.least = math.sqrt(0.005 / sensitivity)

    def on_miss(self, step: Step, rank: int) -> int:
        """SKIP a decoded token's expert of little weight, its first excepted; LOAD the others."""
        if rank == 0 or step.tokens > 1:
            return LOAD
        total = 0.0
        for i in range(len(step.weights)):
            total += float(step.weights[i])
        return SKIP if float(step.weights[rank]) < self.least * total else LOAD
