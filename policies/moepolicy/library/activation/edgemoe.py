"""EdgeMoE: preload by which experts follow which, evict what is used seldom and needed late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class EdgeMoe(Policy):
    """Fetch the next layer's likeliest experts by the last two layers', evict by use and distance
    (EdgeMoE, 2308.14352).

    Prefetch: P(expert at l + 1 | the experts at l and l - 1), the ``n`` most likely (0: as many as
    a token uses) straight into slots. Victim: the least uses / d, where d is how many layers the
    expert's layer is ahead, cyclically; the layer in progress (d = 0) goes last. In a cache per
    layer all candidates have one d: the victim is the least used.

    Departures: the paper counts offline; here the counts are of decoded tokens, of a calibration
    trace where the policy is fitted (`moesim fit edgemoe`), and go on while it runs. The paper's
    models are top-1, and its table is by pairs of experts; here P is the mean over a token's
    experts of two tables, by the expert at l and by the one at l - 1. A table of pairs would have
    n_experts^3 entries a layer; these take 8 n_experts^2 bytes. The paper's bits for each expert
    are chosen when a model is packed, and are not part of it.
    """

    stage_prefetches = False
    always_evicts = True

    def __init__(
        self, context: Context, n: int = 0, params: dict[str, NDArray[Any]] | None = None
    ) -> None:
        if not 0 <= n <= context.n_experts:
            raise PolicyUsageError(f"edgemoe: n must be 0 to {context.n_experts}, not {n}")
        layers, experts = context.n_layers, context.n_experts
        self.n = n or min(context.top_k, experts)
        self.n_layers = layers
        self.n_experts = experts
        self.uses = np.zeros(context.n_keys, np.int64)
        self.layer = np.zeros(1, np.int64)  # in progress
        self.passes = np.zeros(2, np.int64)
        # [back, layer, expert `back` + 1 layers before, expert]: tokens that used both.
        self.together = np.zeros((2, layers, experts, experts), np.int32)
        self.seen = np.zeros((2, layers, experts), np.int32)  # that used the former
        self.chosen = np.zeros((layers, experts), np.int32)  # a layer's experts in its last pass
        self.n_chosen = np.zeros(layers, np.int64)
        self.chosen_in = np.full(layers, -1, np.int64)  # that pass
        self.likely = np.zeros(experts)
        if params is not None:
            self.together[:] = params["together"]
            self.seen[:] = params["seen"]

    @classmethod
    def fit(
        cls, context: Context, steps: Iterable[Step], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """Count which experts follow which."""
        counting = cls(context)
        for step in steps:
            counting.on_step(step)
        return {"together": counting.together, "seen": counting.seen}

    def on_step(self, step: Step) -> None:
        """Count the uses and, of a decoded token, which experts follow which."""
        layer, n = step.layer, len(step.experts)
        now = count_pass(self.passes, step)
        self.layer[0] = layer
        for rank in range(n):
            self.uses[step.experts[rank]] += 1
            self.chosen[layer, rank] = step.experts[rank] - layer * self.n_experts
        self.n_chosen[layer] = n
        self.chosen_in[layer] = now if step.tokens == 1 else -1
        for back in range(2):
            if step.tokens == 1 and self.follows(layer, back, now):
                self.count(layer, back)

    def follows(self, layer: int, back: int, now: int) -> bool:
        """Whether pass ``now`` had one token's step at the layer ``back`` + 1 before ``layer``."""
        before = layer - 1 - back
        return bool(before >= 0 and self.chosen_in[before] == now)

    def count(self, layer: int, back: int) -> None:
        """Count this layer's experts as those that followed the earlier layer's."""
        before = layer - 1 - back
        for i in range(self.n_chosen[before]):
            first = self.chosen[before, i]
            self.seen[back, layer, first] += 1
            for j in range(self.n_chosen[layer]):
                self.together[back, layer, first, self.chosen[layer, j]] += 1

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's ``n`` likeliest experts that have followed these; none for a prompt."""
        layer = step.layer + 1
        if step.tokens > 1 or layer >= self.n_layers:
            return 0
        for e in range(self.n_experts):
            self.likely[e] = 0.0
        for back in range(2):
            if self.follows(layer, back, self.passes[0]):
                self.add_likely(layer, back)
        n = top_n(self.likely, self.n, layer * self.n_experts, keys)
        while n > 0 and self.likely[keys[n - 1] - layer * self.n_experts] <= 0:
            n -= 1
        return n

    def add_likely(self, layer: int, back: int) -> None:
        """Add what each of the earlier layer's experts says of ``layer``."""
        before = layer - 1 - back
        for i in range(self.n_chosen[before]):
            first = self.chosen[before, i]
            if self.seen[back, layer, first] > 0:
                for e in range(self.n_experts):
                    share = self.together[back, layer, first, e] / self.seen[back, layer, first]
                    self.likely[e] += share / self.n_chosen[before]

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate with the least uses for its distance; of equals the lowest key."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            if self.sooner(candidates[i], best):
                best = candidates[i]
        return int(best)

    def sooner(self, key: int, other: int) -> bool:
        """Whether ``key`` is to go before ``other``."""
        distance = (key // self.n_experts - self.layer[0]) % self.n_layers
        others = (other // self.n_experts - self.layer[0]) % self.n_layers
        if (distance == 0) != (others == 0):
            return bool(others == 0)
        # Compared without dividing; where both are of this layer, by their uses alone.
        mine = self.uses[key] * max(others, 1)
        return bool(mine < self.uses[other] * max(distance, 1))
