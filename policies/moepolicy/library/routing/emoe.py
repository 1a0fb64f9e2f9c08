"""eMoE: experts are brought in for many prompts at a time, and tokens make do with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.selection import marked, top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class Emoe(Policy):
    """Bring experts in every ``period`` sequences; decoded tokens take resident ones (eMoE,
    2503.06823).

    Every ``period`` sequences each layer's experts that the gates chose most in them, as many as it
    has slots, are the wanted ones: the missing of these are fetched, a layer ahead, in place of
    unwanted ones. A decoded token whose expert is missing gets the resident one of the next
    greatest logit. While a layer has free slots, and in a prompt, what is missing is loaded, and
    evicts the least recently used of those not wanted, else of all.

    A departure: the paper predicts the experts of coming prompts by a trained model of the last
    ones; here the counts of the last ones are the prediction.
    """

    requires = frozenset({"logits"})
    lossy = True
    stage_prefetches = False

    def __init__(self, context: Context, period: int = 40) -> None:
        if period < 1:
            raise PolicyUsageError(f"emoe: period must be 1 or more, not {period}")
        self.period = period
        self.n_layers = context.n_layers
        self.n_experts = context.n_experts
        self.slots = np.full(1, min(context.slots, context.n_experts), np.int64)
        self.used = np.zeros(context.n_keys, np.int64)
        self.uses = np.zeros(context.n_keys, np.int64)  # by the gates' choice in this period
        self.wanted = np.zeros(context.n_keys, np.bool_)
        self.sequences = np.zeros(1, np.int64)
        self.layer = np.zeros(1, np.int64)
        self.best = np.zeros(context.n_experts, np.int32)

    def on_resize(self, slots: int) -> None:
        """As many experts of a layer are wanted, from the next period on."""
        self.slots[0] = min(slots, self.n_experts)

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """Resident experts in place of missing ones, once the layer's slots are full."""
        for i in range(len(chosen)):
            self.uses[step.layer * self.n_experts + chosen[i]] += 1
        if step.tokens > 1 or np.sum(resident) < self.slots[0]:
            return
        for i in range(len(chosen)):
            if not resident[chosen[i]]:
                chosen[i] = self.next_best(step, resident, chosen, i)

    def next_best(
        self, step: Step, resident: NDArray[np.bool_], chosen: NDArray[np.int32], i: int
    ) -> int:
        """The resident expert of the greatest logit that is not chosen; the ``i``-th if none."""
        best = -1
        for e in range(self.n_experts):
            free = bool(resident[e])
            for j in range(len(chosen)):
                free = free and chosen[j] != e
            if free and (best < 0 or step.logits[e] > step.logits[best]):
                best = e
        return best if best >= 0 else int(chosen[i])

    def on_step(self, step: Step) -> None:
        """Choose anew where a period is over."""
        if step.begins_sequence:
            self.sequences[0] += 1
            if self.sequences[0] > self.period:
                self.sequences[0] = 1
                self.choose()
        self.layer[0] = step.layer

    def choose(self) -> None:
        """Want each layer's most used experts, and count anew."""
        for layer in range(self.n_layers):
            first = layer * self.n_experts
            for key in range(first, first + self.n_experts):
                self.wanted[key] = False
            n = top_n(self.uses[first : first + self.n_experts], self.slots[0], first, self.best)
            for i in range(n):
                self.wanted[self.best[i]] = True
        self.uses[:] = 0

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, a guess or not, as a use."""
        self.used[key] = now

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's wanted experts, after the last layer the first one's."""
        first = (step.layer + 1) % self.n_layers * self.n_experts
        return marked(self.wanted, first, self.n_experts, keys)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The least recently used candidate that is not wanted; else, for a demand, of all."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            stays, others = self.wanted[key], self.wanted[best]
            if stays < others or (stays == others and self.used[key] < self.used[best]):
                best = key
        guess = layer != self.layer[0]
        return -1 if guess and self.wanted[best] else int(best)
