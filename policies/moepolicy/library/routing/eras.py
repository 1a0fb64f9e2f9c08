"""MoE-ERAS: a bonus for residents, or a price for what is missing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.probabilities import softmax
from moepolicy.library.recency.lru import Lru
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step


class MoeEras(Lru):
    """LRU under gates that give resident experts a bonus (MoE-ERAS, expert residency aware
    selection).

    A decoded token gets the top_k of its gate's probabilities, + ``alpha`` for resident experts.
    With ``beta`` above 0 in place of that: of the logits, less ``beta`` x (1 - frequency) for
    missing ones, an expert's frequency being its uses over the most of its layer's. Prompts keep
    their gates' choice. The weights are of the original logits. The rules are the paper's; its
    values for alpha and beta are chosen by model and task, these defaults by nobody.
    """

    lossy = True

    def __init__(self, context: Context, alpha: float = 0.1, beta: float = 0.0) -> None:
        if alpha < 0 or beta < 0:
            raise PolicyUsageError(
                f"moe-eras: alpha and beta must be 0 or more, not {alpha} and {beta}"
            )
        self.eviction_score = np.zeros(context.n_keys, np.int64)
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.n_experts = context.n_experts
        self.uses = np.zeros(context.n_keys, np.int64)
        self.most = np.ones(context.n_layers, np.int64)
        self.score = np.zeros(context.n_experts)

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The top_k of the probabilities with the bonus, or of the logits less the price."""
        if step.tokens > 1:
            return
        if self.beta > 0:
            self.price(step, resident)
        elif softmax(step.logits, self.score):
            for e in range(self.n_experts):
                if resident[e]:
                    self.score[e] += self.alpha
        else:
            return
        top_n(self.score, len(chosen), 0, chosen)

    def price(self, step: Step, resident: NDArray[np.bool_]) -> None:
        """Score the experts by their logits, less the price of missing ones."""
        for e in range(self.n_experts):
            self.score[e] = float(step.logits[e])
            if not resident[e]:
                seldom = 1.0 - self.uses[step.layer * self.n_experts + e] / self.most[step.layer]
                self.score[e] -= self.beta * seldom

    def on_step(self, step: Step) -> None:
        """Count the uses."""
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            self.uses[key] += 1
            self.most[step.layer] = max(self.most[step.layer], self.uses[key])
