"""HOBBIT: a precision for each miss by the weights of the gate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import LOAD, LOW, SKIP
from moepolicy.library.probabilities import is_predicted
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class Hobbit(Policy):
    """Load lighter experts at the lower precision, leave out the lightest (HOBBIT, 2411.01433).

    By weight s, the sum of a token's heavier experts over the sum of all: up to ``high`` an expert
    is wanted at full precision, up to ``low`` any will do, beyond it a miss is skipped. A prompt's
    experts are all loaded in full: the rule is one token's. The victim has the least of recency,
    frequency, frequency at full precision and nearness of its layer, each between 0 and 1 and
    weighed by the four further parameters. The paper's prefetching is `hobbit-spec`.
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


class HobbitSpec(Hobbit):
    """HOBBIT with prefetching, as many layers ahead as it takes to find one missing (2411.01433).

    The gates of the next ``horizon`` layers, on this layer's hidden state, are looked at one after
    the other. Of the first whose top_k experts are not all on the device, those missing are fetched
    straight into slots. All else is as in ``hobbit``, with its defaults. A departure: a guess is
    always fetched at full precision, where the paper chooses by the predicted weights.
    """

    requires = frozenset({"low", "weights", "predictions"})
    stage_prefetches = False

    def __init__(self, context: Context, horizon: int = 3) -> None:
        super().__init__(context)
        if horizon < 1:
            raise PolicyUsageError(f"hobbit-spec: horizon must be 1 or more, not {horizon}")
        self.ahead = horizon
        self.top_k = min(context.top_k, context.n_experts)
        self.held = np.zeros(context.n_keys, np.bool_)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The likeliest experts of the nearest layer that misses some of them."""
        for ahead in range(self.ahead):
            if is_predicted(step, ahead):
                first = (step.layer + 1 + ahead) * self.n_experts
                n = top_n(step.predicted[ahead], self.top_k, first, keys)
                for i in range(n):
                    if not self.held[keys[i]]:
                        return n
        return 0
