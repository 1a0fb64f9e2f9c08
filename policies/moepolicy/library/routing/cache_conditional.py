"""Cache-Conditional Experts: logits that lean towards what is resident."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.recency.lru import Lru
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step


class CacheConditional(Lru):
    """LRU under gates that lean towards resident experts (Cache-Conditional Experts, 2412.00099).

    A decoded token gets the top_k of its logits z + ``strength`` x D for experts that are resident,
    or among the ``sure`` best of z, where D is the moving average of max z - min z of the layer's
    tokens (each new one weighs ``rate``). So the best experts are loaded if they are missing, and
    the others only where no resident one comes close. Prompts keep their gates' choice. The weights
    are of the original logits. The paper's average is over all tokens so far; a moving one follows
    the text.
    """

    lossy = True

    def __init__(
        self, context: Context, strength: float = 0.2, sure: int = 1, rate: float = 0.1
    ) -> None:
        if strength < 0 or not 0 <= sure <= context.n_experts or not 0 < rate <= 1:
            raise PolicyUsageError(
                "cache-conditional: strength must be 0 or more, sure 0 to "
                f"{context.n_experts}, rate above 0, up to 1; not {strength}, {sure} and {rate}"
            )
        self.eviction_score = np.zeros(context.n_keys, np.int64)
        self.strength = float(strength)
        self.sure = sure
        self.rate = float(rate)
        self.spread = np.full(
            context.n_layers, -1.0
        )  # moving average of the logits' range; -1: none
        self.score = np.zeros(context.n_experts)
        self.best = np.zeros(context.n_experts, np.int32)

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The top_k of the logits that lean towards residents."""
        if step.tokens > 1:
            return
        bonus = self.strength * self.follow(step)
        for e in range(len(self.score)):
            self.score[e] = float(step.logits[e]) + (bonus if resident[e] else 0.0)
        n = top_n(step.logits, self.sure, 0, self.best)
        for i in range(n):
            if not resident[self.best[i]]:
                self.score[self.best[i]] += bonus
        top_n(self.score, len(chosen), 0, chosen)

    def follow(self, step: Step) -> float:
        """The average range of the layer's logits, this token's included."""
        least, most = float(step.logits[0]), float(step.logits[0])
        for e in range(1, len(step.logits)):
            least = min(least, float(step.logits[e]))
            most = max(most, float(step.logits[e]))
        before = self.spread[step.layer]
        now = most - least if before < 0 else before + self.rate * (most - least - before)
        self.spread[step.layer] = now
        return float(now)
