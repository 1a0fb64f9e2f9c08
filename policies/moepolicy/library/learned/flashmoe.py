"""FlashMoE: a small network a layer that weighs recency and frequency."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

HIDDEN = 4
EPOCHS = 30
EXAMPLES_A_STEP = 256
GIVEN_UP = 64  # passes after which an expert counts as not used again


class FlashMoe(Policy):
    """Evict the expert that a small network a layer expects to be used last (FlashMoE, 2601.17063).

    The network sees 1 / age, in forward passes since the last use, and uses / the most uses of the
    layer's experts. It has one hidden layer of 4 rectified units.

    Departures: the paper trains the network offline, to evict as Belady would. Here it learns 1 /
    passes to the next use (0 after 64 passes without one), which orders experts by their next use
    as well: offline where it is fitted (`moesim fit flashmoe`), and while it runs by steps of
    ``rate`` down the squared error, which 0 turns off. Unfitted, it starts as the mean of its two
    inputs.
    """

    always_evicts = True

    def __init__(
        self,
        context: Context,
        rate: float = 0.05,
        params: dict[str, NDArray[np.float64]] | None = None,
    ) -> None:
        if not 0 <= rate <= 1:
            raise PolicyUsageError(f"flashmoe: rate must be from 0 to 1, not {rate}")
        layers = context.n_layers
        self.rate = float(rate)
        self.n_experts = context.n_experts
        self.passes = np.zeros(2, np.int64)
        self.uses = np.zeros(context.n_keys, np.int64)
        self.used = np.full(context.n_keys, -GIVEN_UP, np.int64)  # pass of its last use
        self.most = np.ones(layers, np.int64)  # uses, of the layer's experts
        # What the network saw of a key, and in which pass; -1: nothing that it has to learn of.
        self.saw = np.zeros((context.n_keys, 2))
        self.saw_at = np.full(context.n_keys, -1, np.int64)
        self.inner = np.zeros((layers, HIDDEN, 2))
        self.inner[:] = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]
        self.offset = np.zeros((layers, HIDDEN))
        self.outer = np.full((layers, HIDDEN), 0.25)
        self.unit = np.zeros(HIDDEN)
        if params is not None:
            self.inner[:] = params["inner"]
            self.offset[:] = params["offset"]
            self.outer[:] = params["outer"]

    @classmethod
    def fit(
        cls, context: Context, steps: Iterable[Step], rng: np.random.Generator
    ) -> dict[str, NDArray[np.float64]]:
        """Train each layer's network on what it would have seen and when the next use came."""
        watcher = _Watcher(context)
        for step in steps:
            watcher.on_step(step)
        nets = [train(np.array(rows).reshape(-1, 3), rng) for rows in watcher.examples]
        return {
            "inner": np.stack([net[0] for net in nets]),
            "offset": np.stack([net[1] for net in nets]),
            "outer": np.stack([net[2] for net in nets]),
        }

    def on_step(self, step: Step) -> None:
        """Learn from the step's uses, count them, and look at the layer's experts anew."""
        now = count_pass(self.passes, step)
        first = step.layer * self.n_experts
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            if self.saw_at[key] >= 0 and self.saw_at[key] < now:
                self.learn(key, 1.0 / (now - self.saw_at[key]))
            self.uses[key] += 1
            self.used[key] = now
            self.most[step.layer] = max(self.most[step.layer], self.uses[key])
        for key in range(first, first + self.n_experts):
            if self.saw_at[key] >= 0 and now - self.saw_at[key] >= GIVEN_UP:
                self.learn(key, 0.0)
            if self.saw_at[key] < 0:
                self.saw_at[key] = now
                self.saw[key, 0] = self.recency(key)
                self.saw[key, 1] = self.frequency(key)

    def recency(self, key: int) -> float:
        """1 / age: 1 for an expert of this pass."""
        return float(1.0 / (self.passes[0] - self.used[key] + 1))

    def frequency(self, key: int) -> float:
        """Uses over the most of the layer's experts."""
        return float(self.uses[key] / self.most[key // self.n_experts])

    def soonness(self, layer: int, recency: float, frequency: float) -> float:
        """The network of ``layer``; leaves its hidden units in ``unit``."""
        total = 0.0
        for i in range(HIDDEN):
            inner = self.inner[layer, i]
            value = inner[0] * recency + inner[1] * frequency + self.offset[layer, i]
            self.unit[i] = max(value, 0.0)
            total += self.outer[layer, i] * self.unit[i]
        return float(total)

    def learn(self, key: int, target: float) -> None:
        """Move the network of the layer of ``key`` towards ``target`` for what it saw."""
        layer = key // self.n_experts
        recency, frequency = self.saw[key, 0], self.saw[key, 1]
        self.saw_at[key] = -1
        error = self.rate * (target - self.soonness(layer, recency, frequency))
        for i in range(HIDDEN):
            back = error * self.outer[layer, i]
            self.outer[layer, i] += error * self.unit[i]
            if self.unit[i] > 0.0:
                self.inner[layer, i, 0] += back * recency
                self.inner[layer, i, 1] += back * frequency
                self.offset[layer, i] += back

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate expected to be used last; of equals the lowest key."""
        best, least = -1, 0.0
        for i in range(len(candidates)):
            key = candidates[i]
            soon = self.soonness(key // self.n_experts, self.recency(key), self.frequency(key))
            if best < 0 or soon < least:
                best, least = int(key), soon
        return best


class _Watcher(FlashMoe):
    """Keeps, by layer, what the network saw and what came of it, and learns nothing."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, rate=0.0)
        self.examples: list[list[tuple[float, float, float]]] = [
            [] for _ in range(context.n_layers)
        ]

    def learn(self, key: int, target: float) -> None:
        recency, frequency = self.saw[key]
        self.saw_at[key] = -1
        self.examples[key // self.n_experts].append((float(recency), float(frequency), target))


Network = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def train(examples: NDArray[np.float64], rng: np.random.Generator) -> Network:
    """A layer's network for ``examples`` [n, 3] of recency, frequency and what is to come of them.

    Adam on the squared error, from the network that an unfitted policy starts as. Returns inner
    [4, 2], offset [4] and outer [4].
    """
    inner = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    inner += rng.normal(0, 0.01, inner.shape)
    weights = inner, np.zeros(HIDDEN), np.full(HIDDEN, 0.25)
    means, squares = ([np.zeros_like(part) for part in weights] for _ in range(2))
    n_steps = 0
    for _ in range(EPOCHS if len(examples) else 0):
        order = rng.permutation(len(examples))
        for first in range(0, len(order), EXAMPLES_A_STEP):
            n_steps += 1
            slopes = _slopes(weights, examples[order[first : first + EXAMPLES_A_STEP]])
            for i, slope in enumerate(slopes):
                means[i] += 0.1 * (slope - means[i])
                squares[i] += 0.001 * (slope**2 - squares[i])
                size = np.sqrt(squares[i] / (1 - 0.999**n_steps)) + 1e-8
                weights[i][...] -= 0.005 * means[i] / (1 - 0.9**n_steps) / size
    return weights


def _slopes(weights: Network, batch: NDArray[np.float64]) -> Network:
    """The slopes of half the mean squared error in each of the weights."""
    inner, offset, outer = weights
    unit = np.maximum(batch[:, :2] @ inner.T + offset, 0)
    error = (unit @ outer - batch[:, 2]) / len(batch)
    back = error[:, None] * outer * (unit > 0)
    return back.T @ batch[:, :2], back.sum(0), unit.T @ error
