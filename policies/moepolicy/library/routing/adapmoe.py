"""AdapMoE: gating, prefetching and slots by layer, all three."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.budget.planned import planned_slots
from moepolicy.library.probabilities import is_predicted
from moepolicy.library.routing.adapmoe_skip import AdapmoeSkip
from moepolicy.library.selection import top_n
from moepolicy.policy import Context
from moepolicy.steps import Step

# How often the gate of a layer is predicted right from the layer before: of the first four layers,
# then of all others. AdapMoE's authors measured it on Mixtral-8x7B (`src/dp.py` of their code; the
# mean of the others).
RIGHT = (0.0, 0.566, 0.721, 0.789)
RIGHT_LATER = 0.884


class AdapMoe(AdapmoeSkip):
    """LRU with AdapMoE's gating and prefetching, and slots where these help least (2408.10284).

    Gating: as `adapmoe-skip`, with its ``sensitivity``. Prefetching: of a decoded token the first
    of the next gate's top_k experts that is missing, straight into a slot (as in the authors' code,
    ``custom_layers.py``, which has top_k = 2). Slots: layers share them so that a token's expected
    loads are fewest, as a layer's experts were all used alike, and one missing expert were fetched
    ahead where the prediction is right: so the first layers, whose gates are predicted worst or
    not at all, get more.

    Departures: how often predictions are right is taken from what the authors measured on Mixtral,
    for every model; that gating leaves experts out is not counted in sharing the slots.
    """

    requires = frozenset({"weights", "predictions"})
    stage_prefetches = False

    def __init__(self, context: Context, sensitivity: float = 0.125) -> None:
        super().__init__(context, sensitivity)
        self.n_experts = context.n_experts
        self.top_k = min(context.top_k, context.n_experts)
        self.held = np.zeros(context.n_keys, np.bool_)
        self.best = np.zeros(context.n_experts, np.int32)

    @classmethod
    def share_slots(cls, total: int, context: Context) -> NDArray[np.int64]:
        """The shares with the fewest expected loads, int64[n_layers]."""
        hits = np.empty((context.n_layers, context.n_experts + 1))
        for layer in range(context.n_layers):
            right = RIGHT[layer] if layer < len(RIGHT) else RIGHT_LATER
            hits[layer] = -expected_loads(context.n_experts, context.top_k, right)
        return planned_slots(hits, total)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load as a use, and that the key is on the device."""
        self.eviction_score[key] = now
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The likeliest of the next gate's choice that is missing; none for a prompt."""
        if step.tokens > 1 or not is_predicted(step, 0):
            return 0
        first = (step.layer + 1) * self.n_experts
        n = top_n(step.predicted[0], self.top_k, first, self.best)
        for i in range(n):
            if not self.held[self.best[i]]:
                keys[0] = self.best[i]
                return 1
        return 0


def expected_loads(n_experts: int, top_k: int, right: float) -> NDArray[np.float64]:
    """float64[n_experts + 1]: the loads that a token waits for in a layer of 0, 1, ... n_experts
    slots, where one that is missing has been fetched ahead with the chance ``right``.

    The authors' ``f`` (top_k = 2 of 8), for any top_k: M missing experts, as many as a draw of
    top_k from all has outside the slots, are M - 1 loads if the prediction is right and M > 0.
    """
    slots = np.arange(n_experts + 1)
    missing = top_k * (n_experts - slots) / n_experts
    none_missing = np.ones(n_experts + 1)
    for i in range(top_k):
        none_missing *= np.maximum(slots - i, 0) / (n_experts - i)
    return np.asarray(missing - right * (1.0 - none_missing))
