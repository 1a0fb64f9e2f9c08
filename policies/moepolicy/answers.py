"""Policies whose gain is in what they make of a miss; all of them change what a model computes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moepolicy.eviction import Lru
from moepolicy.kinds import LOAD, LOW, SKIP, SUBSTITUTE
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class Hobbit(Policy):
    """Load lighter experts at the lower precision, leave out the lightest (HOBBIT, 2411.01433).

    By weight s, the sum of a token's heavier experts over the sum of all: up to ``high`` an expert
    is wanted at full precision, up to ``low`` any will do, beyond it a miss is skipped. A prompt's
    experts are all loaded in full: the rule is one token's. The victim has the least of recency,
    frequency, frequency at full precision and nearness of its layer, each between 0 and 1 and
    weighed by the four further parameters. The paper's prefetching is not part of it.
    """

    requires = frozenset({"low", "weights"})
    lossy = True

    def __init__(
        self,
        context: Context,
        high: float = 0.6,
        low: float = 0.9,
        recency: float = 0.25,
        frequency: float = 0.25,
        high_frequency: float = 0.25,
        nearness: float = 0.25,
    ) -> None:
        if not 0 <= high <= low:
            raise PolicyUsageError(f"hobbit: high must be from 0 to low, not {high} with low={low}")
        self.high = float(high)
        self.low = float(low)
        self.weights = np.array([recency, frequency, high_frequency, nearness], np.float64)
        self.n_experts = context.n_experts
        self.n_layers = context.n_layers
        # Of each key: the pass of its last use, its uses, those at full precision.
        self.used = np.zeros((context.n_keys, 3), np.int64)
        self.now = np.zeros(2, np.int64)  # the pass, counted from 1, and its layer

    def on_step(self, step: Step) -> None:
        """Count each expert's use, and whether its rank asked for full precision."""
        if self.now[0] == 0 or step.layer <= self.now[1]:
            self.now[0] += 1
        self.now[1] = step.layer
        for rank in range(len(step.experts)):
            used = self.used[step.experts[rank]]
            used[0] = self.now[0]
            used[1] += 1
            used[2] += self.share_before(step, rank) <= self.high

    def share_before(self, step: Step, rank: int) -> float:
        """The weight of the experts heavier than the ``rank``-th, of all; 0 in a prompt."""
        if step.tokens > 1:
            return 0.0
        before, total = 0.0, 0.0
        for i in range(len(step.experts)):
            if i < rank:
                before += float(step.weights[i])
            total += float(step.weights[i])
        return before / total if total > 0 else 0.0

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD, LOW or SKIP by the share of the weights before the expert."""
        share = self.share_before(step, rank)
        if share <= self.high:
            return LOAD
        return LOW if share <= self.low else SKIP

    def precision(self, step: Step, rank: int) -> int:
        """LOAD where the share of the weights before the expert is up to ``high``, else LOW."""
        return LOAD if self.share_before(step, rank) <= self.high else LOW

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate with the lowest score."""
        best = candidates[0]
        least = self.score(layer, best)
        for i in range(1, len(candidates)):
            score = self.score(layer, candidates[i])
            if score < least:
                best, least = candidates[i], score
        return int(best)

    def score(self, layer: int, key: int) -> float:
        """How much is in favour of keeping ``key`` while ``layer`` runs."""
        passes = self.now[0]
        used = self.used[key]
        distance = abs(key // self.n_experts - layer)
        weights = self.weights
        return float(
            weights[0] * used[0] / passes
            + weights[1] * used[1] / passes
            + weights[2] * used[2] / passes
            + weights[3] * (1.0 - distance / self.n_layers)
        )


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
        self.used = np.zeros(context.n_keys, np.int64)
        self.least = math.sqrt(0.005 / sensitivity)

    def on_miss(self, step: Step, rank: int) -> int:
        """SKIP a decoded token's expert of little weight, its first excepted; LOAD the others."""
        if rank == 0 or step.tokens > 1:
            return LOAD
        total = 0.0
        for i in range(len(step.weights)):
            total += float(step.weights[i])
        return SKIP if float(step.weights[rank]) < self.least * total else LOAD


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
        self.used = np.zeros(context.n_keys, np.int64)
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
