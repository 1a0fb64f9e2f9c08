"""Policies that route: to the same experts, to the next best, to residents."""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import Context
from moepolicy.library.recency.lru import Lru


class Kept(Lru):
    """Has a say in the routing and uses it for nothing."""

    lossy = True

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        pass


class Second(Lru):
    """Of some tokens, the expert of least weight gives way to the best one that was not chosen.

    The logits alone say of which: those whose best one has an even number, and every third token.
    """

    lossy = True

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        best = -1
        for e in range(len(step.logits)):
            taken = False
            for i in range(len(chosen)):
                taken = taken or chosen[i] == e
            if not taken and (best < 0 or step.logits[e] > step.logits[best]):
                best = e
        if best >= 0 and (best % 2 == 0 or row % 3 == 1):
            chosen[len(chosen) - 1] = best


class ToResidents(Lru):
    """Adds ``bias`` to the logits of experts that are there and takes the K greatest: the cache
    prior of Mixture of Cache-Conditional Experts (arXiv 2412.00099), with a constant."""

    lossy = True

    def __init__(self, context: Context, bias: float = 1.0) -> None:
        super().__init__(context)
        self.bias = bias
        self.scores = np.zeros(context.n_experts, np.float32)

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        for e in range(len(step.logits)):
            self.scores[e] = step.logits[e] + self.bias * resident[e]
        for i in range(len(chosen)):
            best = 0
            for e in range(len(self.scores)):
                if self.scores[e] > self.scores[best]:
                    best = e
            chosen[i] = best
            self.scores[best] = -np.inf


class ByToken(Second):
    """The same for tokens of even numbers alone, and for all of those that begin a sequence."""

    requires = frozenset({"tokens"})

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        if step.begins_sequence or step.token_ids[row] % 2 == 0:
            super().route(step, row, resident, chosen)
