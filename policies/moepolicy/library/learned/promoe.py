"""ProMoE: a learned predictor of the next layer's experts, prefetched into an LRU cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.probabilities import softmax
from moepolicy.library.selection import lowest, top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

RIDGE = 1.0  # as much as one use seen, against maps of rare experts that fit by chance


class ProMoe(Policy):
    """LRU that fetches what a learned predictor expects of the next layer (ProMoE, 2410.22134).

    Each layer has a linear map from its gate's probabilities to the next layer's experts. The
    ``n`` experts of the greatest value (0: as many as a token uses) are fetched straight into
    slots. The map is learned from decoded tokens, towards 1 for an expert that is used and 0 for
    one that is not: offline by ridge regression where it is fitted (`moesim fit promoe`), and while
    it runs by normalised least mean squares at ``rate``, which 0 turns off. The maps take 8
    n_experts^2 bytes a layer.

    Departures: the paper trains a small network offline, on hidden states, which no policy sees
    here. That demand overtakes a running prefetch, and that a layer's prefetches are cancelled
    once its gate has spoken, is what every policy has here (the link's chunks, the state machine).
    """

    requires = frozenset({"logits"})
    stage_prefetches = False
    always_evicts = True

    def __init__(
        self,
        context: Context,
        n: int = 0,
        rate: float = 0.1,
        params: dict[str, NDArray[np.float64]] | None = None,
    ) -> None:
        if not 0 <= n <= context.n_experts:
            raise PolicyUsageError(f"promoe: n must be 0 to {context.n_experts}, not {n}")
        if not 0 <= rate < 2:
            raise PolicyUsageError(f"promoe: rate must be 0 or more and below 2, not {rate}")
        layers, experts = context.n_layers, context.n_experts
        self.n = n or min(context.top_k, experts)
        self.rate = float(rate)
        self.n_layers = layers
        self.n_experts = experts
        self.used = np.zeros(context.n_keys, np.int64)
        # Of the layer that is predicted: [layer, expert of the layer before, expert of it].
        self.weight = np.zeros((layers, experts, experts))
        self.bias = np.zeros((layers, experts))
        self.value = np.zeros((layers, experts))  # as predicted last
        self.given = np.zeros((layers, experts))  # the probabilities that it was predicted from
        self.change = np.zeros(experts)
        self.scratch = np.zeros(experts)
        self.open = np.zeros(layers, np.bool_)  # predicted, and its gate has not spoken yet
        if params is not None:
            self.weight[:] = np.swapaxes(params["weight"], 1, 2)
            self.bias[:] = params["bias"]

    @classmethod
    def fit(
        cls,
        context: Context,
        steps: Iterable[Step],
        rng: np.random.Generator,
    ) -> dict[str, NDArray[np.float64]]:
        """Each layer's map by ridge regression on the probabilities of the layer before."""
        layers, n = context.n_layers, context.n_experts
        squares = np.zeros((layers, n + 1, n + 1))
        products = np.zeros((layers, n + 1, n))
        given = np.ones(n + 1)  # the last for the bias
        known = False  # whether it is of the layer before
        for step in steps:
            if known and step.layer and step.tokens == 1:
                used = np.zeros(n)
                used[step.experts - step.layer * n] = 1.0
                squares[step.layer] += np.outer(given, given)
                products[step.layer] += np.outer(given, used)
            known = step.tokens == 1 and bool(softmax(step.logits, given[:n]))
        solved = np.linalg.solve(squares + RIDGE * np.eye(n + 1), products)
        return {
            "weight": np.swapaxes(solved[:, :n], 1, 2).copy(),
            "bias": solved[:, n].copy(),
        }

    def on_step(self, step: Step) -> None:
        """Learn from what was predicted of this layer; of a decoded token predict the next."""
        layer = step.layer
        if self.open[layer] and step.tokens == 1:
            self.learn(step)
        self.open[layer] = False
        if layer + 1 < self.n_layers:
            self.open[layer + 1] = step.tokens == 1 and softmax(step.logits, self.given[layer + 1])
            if self.open[layer + 1]:
                self.predict(layer + 1)

    def learn(self, step: Step) -> None:
        """Move the map of the step's layer towards what the step uses."""
        layer = step.layer
        given = self.given[layer]
        norm = 1.0
        for i in range(self.n_experts):
            norm += given[i] * given[i]
        change = self.change
        np.subtract(0.0, self.value[layer], change)
        for rank in range(len(step.experts)):
            expert = step.experts[rank] - layer * self.n_experts
            change[expert] = 1.0 - self.value[layer, expert]
        np.multiply(change, self.rate, change)
        np.divide(change, norm, change)
        np.add(self.bias[layer], change, self.bias[layer])
        for i in range(self.n_experts):
            row = self.weight[layer, i]
            np.multiply(change, given[i], self.scratch)
            np.add(row, self.scratch, row)

    def predict(self, layer: int) -> None:
        """Work out the values of the experts of ``layer``."""
        value = self.value[layer]
        np.positive(self.bias[layer], value)
        for i in range(self.n_experts):
            np.multiply(self.weight[layer, i], self.given[layer, i], self.scratch)
            np.add(value, self.scratch, value)

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, a guess or not, as a use."""
        self.used[key] = now

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's ``n`` experts of the greatest value above 0."""
        layer = step.layer + 1
        if layer >= self.n_layers or not self.open[layer]:
            return 0
        n = top_n(self.value[layer], self.n, layer * self.n_experts, keys)
        while n > 0 and self.value[layer, keys[n - 1] - layer * self.n_experts] <= 0:
            n -= 1
        return n

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose last use is longest ago."""
        return lowest(self.used, candidates)
