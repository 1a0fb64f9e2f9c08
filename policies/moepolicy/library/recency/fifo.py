"""Evict the expert loaded first."""

from __future__ import annotations

import numpy as np

from moepolicy.policy import Context
from moepolicy.scores import ByScore


class Fifo(ByScore):
    """Evict the expert that was loaded first."""

    def __init__(self, context: Context) -> None:
        self.eviction_score = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load."""
        self.eviction_score[key] = now
