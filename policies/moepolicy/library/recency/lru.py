"""Evict the least recently used expert."""

from __future__ import annotations

import numpy as np

from moepolicy.policy import Context
from moepolicy.scores import ByScore


class Lru(ByScore):
    """Evict the least recently used expert (the cache of arXiv 2312.17238)."""

    def __init__(self, context: Context) -> None:
        self.eviction_score = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.eviction_score[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, a guess or not, as a use."""
        self.eviction_score[key] = now
