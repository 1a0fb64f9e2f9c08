"""Foresight: evict what a map from the newest experts of all layers expects to be used last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.selection import lowest
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

# Chosen on the development stretches that docs/research.md names.
SELF = 0.1  # what an expert's own last use says before anything is learned
HABIT = 0.2  # what its decayed count of uses says, always
HALF_LIFE = 16.0  # of that count, in steps of the layer
STEADY = 0.4  # a step of learning never moves a sum by more than this share of the error
REACH_EXPERTS = 1600  # experts of other layers that an expert is told by, about
PAIRED = 32  # experts of a layer, at most, for pairs to be told apart
PAIRS = 256  # rows for the pairs of a layer; rarer pairs share them
RECENT = 0.05  # what recency is worth to an expert used in this step
RECENT_STEPS = 32.0  # steps of the layer after which it is worth half of that
LONG_AGO = -1e9  # when an expert was used last that never was


class Foresight(Policy):
    """Evict the expert whose next use is expected last, by what the experts of all layers say.

    Each expert has a value that estimates ``discount`` ** (steps of its layer until its next use,
    less 1). The value is a sum: a bias, a decayed count of the expert's uses, and one learned
    weight for each signal. The signals are what the layers nearby used last, of this token up to
    the step's layer and of the last token beyond: each expert, the pair of the two heaviest, and
    the pair of the heaviest ones of a layer and of the layer before it.

    The weights are learned while the policy runs, by TD(0): at each step of a layer the value of
    the step before moves towards 1 for an expert that the step uses, and for the others towards
    ``discount`` times their new value. Nothing is fitted offline, and neither logits nor
    predictions are read. Only additions, products and divisions are computed, so that simulated and
    live decisions are equal.

    Values are told apart by what is learned where it says much, and else by age: the victim has the
    least of its value, or 0 where it is less, and ``recent`` * 32 / (32 + age), the age being steps
    of the layer since its last use. A step of several tokens counts as so many. Most experts of a
    large cache have values about 0, which say more of noise than of their next use. Where
    ``recent`` is 0 the victim has the least value.

    In one cache for all layers an expert also has to wait until its layer's next step: its merit is
    multiplied by ``discount`` ** (the layers until then, less 1, over all layers).

    ``reach`` is how many layers before and after a layer have a say; 0 takes as many as have some
    1600 experts together. Pairs are told apart in layers of at most 32 experts, by at most
    ``pairs`` rows a kind; 0 leaves them out. The decayed count weighs ``habit``; its half-life is
    16 steps of the layer. `moesim fit foresight` keeps the weights of a calibration trace, to begin
    with. The rule is this project's own: docs/research.md has the method, the results and what
    failed.

    The class is long because signals, values and their lessons share the arrays that a step reads
    and the next one teaches.
    """

    always_evicts = True

    def __init__(
        self,
        context: Context,
        discount: float = 0.87,
        rate: float = 0.003,
        reach: int = 0,
        pairs: int = PAIRS,
        habit: float = HABIT,
        recent: float = RECENT,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        _check(discount, rate, reach, pairs, habit, recent)
        layers, experts = context.n_layers, context.n_experts
        self.discount = float(discount)
        self.rate = float(rate)
        self.n_experts = experts
        self.top_k = min(context.top_k, experts)
        reach = reach or max(2, (REACH_EXPERTS // experts - 1) // 2)
        self.window = min(2 * reach + 1, layers)
        # The first of the layers that a layer is told by: as many for the outermost layers.
        self.first = np.clip(np.arange(layers) - reach, 0, layers - self.window)
        self.n_pairs = min(pairs, experts * experts) if 1 < experts <= PAIRED else 0
        self.width = experts + 2 * self.n_pairs  # rows of weights a layer
        self.weight = np.zeros((layers, self.window * self.width, experts), np.float32)
        for layer in range(layers):
            own = (layer - self.first[layer]) * self.width
            self.weight[layer, own : own + experts] = SELF * np.eye(experts)
        self.bias = np.zeros((layers, experts))
        self.habit = float(habit)
        self.uses = np.zeros((layers, experts))  # decayed counts
        self.keeps = 0.5 ** (1.0 / HALF_LIFE)
        self.value = np.zeros(context.n_keys)
        self.recent = float(recent)
        self.floor = 0.0 if recent > 0 else LONG_AGO
        self.clock = np.zeros(layers)  # tokens
        self.last = np.full(context.n_keys, LONG_AGO)  # use, by the clock of the layer
        self.merit = np.zeros(context.n_keys)
        self.worth = np.zeros(context.n_keys)  # merit as seen from the step's layer: the least goes
        self.n_layers = layers
        self.shared = context.scope == "global"
        # What is left of the merit of a layer's experts (column), seen from a layer (row).
        away = np.arange(layers)[None, :] - np.arange(layers)[:, None] - 1
        self.nearness = self.discount ** (away % layers / layers)
        self.fresh = np.zeros(experts)
        self.scratch = np.zeros(experts)
        self.used = np.zeros(experts, np.bool_)
        # What each layer used last, heaviest first; more than these of a prompt's are not told.
        most = min(2 * context.top_k, experts)
        self.newest = np.zeros((layers, most), np.int32)
        self.n_newest = np.zeros(layers, np.int64)
        # The rows that a layer's values were summed from.
        self.rows = np.zeros((layers, self.window * (most + 2)), np.int32)
        self.n_rows = np.zeros(layers, np.int64)
        self.now = np.zeros(self.window * (most + 2), np.int32)
        if params is not None:
            if params["weight"].shape != self.weight.shape:
                raise PolicyUsageError(
                    "foresight: params is of another reach or other pairs than are asked for"
                )
            self.weight[:] = params["weight"]
            self.bias[:] = params["bias"]

    @classmethod
    def fit(
        cls, context: Context, steps: Iterable[Step], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """The weights after the steps of a calibration trace."""
        learning = cls(context)
        for step in steps:
            learning.on_step(step)
        return learning.learned()

    def learned(self) -> dict[str, NDArray[Any]]:
        """The weights as they are now."""
        return {"weight": self.weight.copy(), "bias": self.bias.copy()}

    def on_step(self, step: Step) -> None:
        """Value the layer's experts anew, and learn."""
        self.foresee(step)

    def foresee(self, step: Step) -> None:
        """Take note of what is used, value the layer's experts anew, and learn from both."""
        layer = step.layer
        self.take_note(step)
        n = self.gather(layer)
        self.add_up(layer, n)
        self.learn(layer)
        np.positive(self.now[:n], self.rows[layer, :n])
        self.n_rows[layer] = n
        self.judge(layer)

    def judge(self, layer: int) -> None:
        """Keep the values of the layer's experts, and what all are worth from here."""
        begin, end = layer * self.n_experts, (layer + 1) * self.n_experts
        np.positive(self.fresh, self.value[begin:end])  # copies, and allocates nothing compiled
        newer, merit = self.scratch, self.merit[begin:end]
        np.subtract(self.clock[layer], self.last[begin:end], newer)  # the age
        np.add(newer, RECENT_STEPS, newer)
        np.divide(self.recent * RECENT_STEPS, newer, newer)
        np.fmax(self.fresh, self.floor, merit)
        np.add(merit, newer, merit)
        if not self.shared:
            np.positive(merit, self.worth[begin:end])
            return
        for other in range(self.n_layers):
            begin, end = other * self.n_experts, (other + 1) * self.n_experts
            np.multiply(self.merit[begin:end], self.nearness[layer, other], self.worth[begin:end])

    def take_note(self, step: Step) -> None:
        """Which experts the step uses: marked, among the newest, and in the decayed counts."""
        layer = step.layer
        first = layer * self.n_experts
        kept = self.keeps
        for _ in range(1, step.tokens):
            kept *= self.keeps
        self.used[:] = False
        np.multiply(self.uses[layer], kept, self.uses[layer])
        n = min(len(step.experts), self.newest.shape[1])
        self.n_newest[layer] = n
        for i in range(n):
            self.newest[layer, i] = step.experts[i] - first
        wanted = len(step.experts)
        self.clock[layer] += step.tokens
        for i in range(wanted):
            expert = step.experts[i] - first
            self.used[expert] = True
            self.last[first + expert] = self.clock[layer] - i / (wanted + 1.0)
            # Of several tokens, how many used it is told by its rank alone: as if they fell evenly.
            often = 1.0
            if step.tokens > 1:
                often = min(1.0, 2.0 * self.top_k * (wanted - i) / (wanted * (wanted + 1.0)))
            self.uses[layer, expert] += (1.0 - kept) * often

    def gather(self, layer: int) -> int:
        """Write the rows of all that tells of ``layer`` into ``now``; returns how many."""
        n = 0
        for i in range(self.window):
            other = self.first[layer] + i
            begin = i * self.width
            for j in range(self.n_newest[other]):
                self.now[n] = begin + self.newest[other, j]
                n += 1
            if self.n_pairs == 0 or self.n_newest[other] < 1:
                continue
            heaviest = int(self.newest[other, 0])
            begin += self.n_experts
            if self.n_newest[other] > 1:
                second = int(self.newest[other, 1])
                pair = min(heaviest, second) * self.n_experts + max(heaviest, second)
                self.now[n] = begin + pair % self.n_pairs
                n += 1
            if i > 0 and self.n_newest[other - 1] > 0:
                pair = heaviest * self.n_experts + int(self.newest[other - 1, 0])
                self.now[n] = begin + self.n_pairs + pair % self.n_pairs
                n += 1
        return n

    def add_up(self, layer: int, n: int) -> None:
        """The values of the layer's experts by the first ``n`` rows of ``now``, into ``fresh``."""
        np.multiply(self.uses[layer], self.habit, self.fresh)
        np.add(self.bias[layer], self.fresh, self.fresh)
        for i in range(n):
            np.add(self.fresh, self.weight[layer, self.now[i]], self.fresh)

    def learn(self, layer: int) -> None:
        """Move the values of the layer's last step towards what has come of them."""
        n = self.n_rows[layer]
        if n == 0 or self.rate == 0:
            return
        begin, end = layer * self.n_experts, (layer + 1) * self.n_experts
        more = self.scratch
        np.fmax(self.fresh, 0.0, more)
        np.fmin(more, 1.0, more)
        np.multiply(more, self.discount, more)
        for e in range(self.n_experts):
            if self.used[e]:
                more[e] = 1.0
        np.subtract(more, self.value[begin:end], more)
        np.multiply(more, min(self.rate, STEADY / n), more)
        # What is added to each term of a value.
        np.add(self.bias[layer], more, self.bias[layer])
        for i in range(n):
            row = self.weight[layer, self.rows[layer, i]]
            np.add(row, more, row)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least worth; of equals the lowest key."""
        return lowest(self.worth, candidates)


class ForesightBypass(Foresight):
    """Foresight that keeps, of the cache and the step's experts, those of the greatest worth.

    A missing expert of no greater worth than all that could make room for it passes through a
    staging buffer. It takes a slot at the end of its step where an expert of that step, which could
    not go before, has the least worth. There are ``top_k`` staging buffers.
    """

    always_evicts = False

    def __init__(
        self,
        context: Context,
        discount: float = 0.87,
        rate: float = 0.003,
        reach: int = 0,
        pairs: int = PAIRS,
        habit: float = HABIT,
        recent: float = RECENT,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        super().__init__(context, discount, rate, reach, pairs, habit, recent, params)
        self.staging = context.top_k
        self.held = np.zeros(context.n_keys, np.bool_)
        self.wanted = np.zeros(context.n_experts, np.int32)
        self.n_wanted = np.zeros(1, np.int64)

    def on_step(self, step: Step) -> None:
        """Learn, and note what the step wants."""
        self.foresee(step)
        self.remember(step)

    def remember(self, step: Step) -> None:
        """Note what the step wants."""
        self.n_wanted[0] = len(step.experts)
        for rank in range(len(step.experts)):
            self.wanted[rank] = step.experts[rank]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least worth; -1 where another expert is to go."""
        least = lowest(self.worth, candidates)
        if self.worth[incoming] <= self.worth[least]:
            return -1
        for rank in range(self.n_wanted[0]):
            key = self.wanted[rank]
            if self.held[key] and self.worth[key] < self.worth[least]:
                return -1  # that one goes instead, once its pin has dropped: see retain
        return least

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least worth; -1 where that of ``key`` is no greater."""
        least = lowest(self.worth, candidates)
        return least if self.worth[key] > self.worth[least] else -1


def _check(
    discount: float, rate: float, reach: int, pairs: int, habit: float, recent: float
) -> None:
    """PolicyUsageError for a parameter that there cannot be."""
    if not 0 <= discount < 1:
        raise PolicyUsageError(f"foresight: discount must be 0 or more, below 1: {discount}")
    if not 0 <= rate <= STEADY:
        raise PolicyUsageError(f"foresight: rate must be from 0 to {STEADY}, not {rate}")
    if reach < 0:
        raise PolicyUsageError(f"foresight: reach must be 0 or more, not {reach}")
    if pairs < 0:
        raise PolicyUsageError(f"foresight: pairs must be 0 or more, not {pairs}")
    for name, value in (("habit", habit), ("recent", recent)):
        if not 0 <= value <= 1:
            raise PolicyUsageError(f"foresight: {name} must be from 0 to 1, not {value}")
