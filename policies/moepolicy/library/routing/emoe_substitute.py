"""eMoE's answer to a miss: the next best resident expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import LOAD, SUBSTITUTE
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Context
from moepolicy.steps import Step


class EmoeSubstitute(Lru):
    """LRU whose decoded tokens take the next best resident expert on a miss (eMoE, 2503.06823).

    The gate's logits say which is best of those that the token did not choose; while the layer
    holds fewer than ``slots`` experts, and in a prompt, a miss is loaded. So what is resident is
    the choice of the last prompt: eMoE's predictor, which chooses for 40 prompts at a time, is
    not part of it.
    """

    requires = frozenset({"logits"})
    lossy = True

    def __init__(self, context: Context) -> None:
        self.eviction_score = np.zeros(context.n_keys, np.int64)
        self.n_experts = context.n_experts
        self.slots = min(context.slots, context.n_experts)

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD a prompt's experts; a decoded token's have a SUBSTITUTE."""
        return LOAD if step.tokens > 1 else SUBSTITUTE

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The likeliest candidate that the step does not want; -1 while there are free slots."""
        if len(candidates) < self.slots:
            return -1
        best = -1
        first = step.layer * self.n_experts
        for i in range(len(candidates)):
            key = candidates[i]
            wanted = False
            for j in range(len(step.experts)):
                wanted = wanted or step.experts[j] == key
            if not wanted and (best < 0 or step.logits[key - first] > step.logits[best - first]):
                best = int(key)
        return best
