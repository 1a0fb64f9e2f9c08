"""The next layer's gate as it was predicted, kept until that layer routes."""

from __future__ import annotations

import numpy as np

from moepolicy.library.probabilities import is_predicted
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Context
from moepolicy.steps import Step


class RoutesAhead(Lru):
    """LRU that remembers what this token's last layer predicted of the next one's gate."""

    lossy = True

    def __init__(self, context: Context) -> None:
        self.eviction_score = np.zeros(context.n_keys, np.int64)
        self.n_experts = context.n_experts
        self.top_k = min(context.top_k, context.n_experts)
        self.ahead = np.zeros(context.n_experts, np.float32)  # logits, of the layer `ahead_of`
        self.ahead_of = np.full(1, -1, np.int64)  # -1: none

    def look_ahead(self, step: Step) -> None:
        """Remember the next layer's prediction, of one token; a batch's is its mean, no token's."""
        self.ahead_of[0] = -1
        if step.tokens == 1 and is_predicted(step, 0):
            self.ahead_of[0] = step.layer + 1
            for e in range(self.n_experts):
                self.ahead[e] = step.predicted[0, e]

    def foresaw(self, step: Step) -> bool:
        """Whether the last step predicted this one's gate."""
        return bool(step.tokens == 1 and self.ahead_of[0] == step.layer)
