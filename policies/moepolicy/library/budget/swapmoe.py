"""SwapMoE: tokens make do with a small set of experts, which is exchanged in the background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.library.probabilities import softmax
from moepolicy.library.selection import marked, top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class SwapMoe(Policy):
    """Route within a set of important experts that fits, and exchange it slowly (SwapMoE,
    2308.15030).

    An expert's importance is the sum of its gate probabilities, over tokens; every ``period``
    forward passes the most important of each layer, as many as it has slots, are its virtual
    experts, and all importance halves. Missing ones are fetched a layer ahead, in place of the
    least important that is not virtual. Each token, prompts included, gets the best by its logits
    among the experts that are there, so that no token waits; the gate's own choice while a layer
    has free slots.

    Departures: the paper's importance is norm(x) x g x norm(W), with the norms of the token and of
    the expert's weights, which no policy sees; its set's first members are profiled offline, here
    they are the first that were used. The slots of a layer are those that the cache has, where the
    paper gives layers different numbers.
    """

    requires = frozenset({"logits"})
    lossy = True
    stage_prefetches = False

    def __init__(self, context: Context, period: int = 16) -> None:
        if period < 1:
            raise PolicyUsageError(f"swapmoe: period must be 1 or more, not {period}")
        self.period = period
        self.n_layers = context.n_layers
        self.n_experts = context.n_experts
        self.slots = np.full(1, min(context.slots, context.n_experts), np.int64)
        self.importance = np.zeros(context.n_keys)
        self.is_virtual = np.zeros(context.n_keys, np.bool_)
        self.passes = np.zeros(2, np.int64)
        self.chosen_in = np.zeros(1, np.int64)  # the pass that chose the virtual experts
        self.likely = np.zeros(context.n_experts)
        self.score = np.zeros(context.n_experts)
        self.best = np.zeros(context.n_experts, np.int32)

    def on_resize(self, slots: int) -> None:
        """As many experts of a layer are virtual, from the next period on."""
        self.slots[0] = min(slots, self.n_experts)

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The best by the logits of those that are there, once the layer's slots are full."""
        first = step.layer * self.n_experts
        if softmax(step.logits, self.likely):
            for e in range(self.n_experts):
                self.importance[first + e] += self.likely[e]
        there = np.sum(resident)
        if there < len(chosen) or there < self.slots[0]:
            return
        for e in range(self.n_experts):
            self.score[e] = float(step.logits[e]) if resident[e] else -np.inf
        top_n(self.score, len(chosen), 0, chosen)

    def on_step(self, step: Step) -> None:
        """Choose the virtual experts anew where a period is over."""
        now = count_pass(self.passes, step)
        if now - self.chosen_in[0] >= self.period:
            self.chosen_in[0] = now
            self.choose()

    def choose(self) -> None:
        """The most important experts of each layer are virtual; all importance halves."""
        for layer in range(self.n_layers):
            first = layer * self.n_experts
            importance = self.importance[first : first + self.n_experts]
            n = top_n(importance, self.slots[0], first, self.best)
            for e in range(self.n_experts):
                self.is_virtual[first + e] = False
                self.importance[first + e] *= 0.5
            for i in range(n):
                self.is_virtual[self.best[i]] = True

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's virtual experts, after the last layer the first one's."""
        first = (step.layer + 1) % self.n_layers * self.n_experts
        return marked(self.is_virtual, first, self.n_experts, keys)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The least important candidate that is not virtual; else, for a demand, of all."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            stays, others = self.is_virtual[key], self.is_virtual[best]
            less = self.importance[key] < self.importance[best]
            if stays < others or (stays == others and less):
                best = key
        guess = layer != self.passes[1]
        return -1 if guess and self.is_virtual[best] else int(best)
