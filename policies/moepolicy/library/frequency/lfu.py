"""Evict the expert with the fewest uses."""

from __future__ import annotations

import numpy as np

from moepolicy.policy import Context
from moepolicy.scores import ByScore


class Lfu(ByScore):
    """Evict the expert used least often since the start, resident or not (perfect LFU)."""

    def __init__(self, context: Context) -> None:
        self.eviction_score = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Count the use."""
        self.eviction_score[key] += 1

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count the use that the load is for; a guess is none."""
        if not speculative:
            self.eviction_score[key] += 1
