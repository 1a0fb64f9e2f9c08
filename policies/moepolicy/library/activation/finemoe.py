"""fMoE, later FineMoE: match the gates' probabilities of this pass to those of earlier passes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.library.probabilities import softmax
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class FineMoe(Policy):
    """Fetch what the gates said in the most similar earlier pass (fMoE, FineMoE, 2502.05370).

    A pass is the map of its gates' probabilities [layers, experts]; ``capacity`` of them are kept,
    a full store replaces the one most like the newcomer. The first ``distance`` layers are
    predicted as a pass begins, by the likest beginning; layer l + ``distance`` at layer l, by the
    cosine of the maps' rows up to l. Of the map that matches with cosine s, a layer's likeliest
    experts are taken until their probabilities add up to 1 - s, top_k at least: the better the
    match, the fewer. Missing ones are fetched straight into slots, ``n`` a step (0: as many as a
    token uses), in the order of probability / layers to go, and are spared by other guesses until
    their layer. The victim has the least probability, as last predicted (1 before that), x visits.

    Read besides the paper: ``expert_map.py`` and ``cache.cpp`` of the authors' code. A departure:
    the paper finds the likest beginning by the embedding of the prompt, or of the token, which no
    policy sees here (a token's id is none). What stands in for it is the last layer's gate in the
    pass before: it sees the hidden state that the token is made of. A sequence's first pass has
    none, and its first layers no prediction. A batch has one map, of its mean probabilities.
    """

    requires = frozenset({"logits"})
    stage_prefetches = False

    def __init__(self, context: Context, capacity: int = 64, distance: int = 6, n: int = 0) -> None:
        if capacity < 1 or distance < 1:
            raise PolicyUsageError(
                f"finemoe: capacity and distance must be 1 or more, not {capacity} and {distance}"
            )
        if not 0 <= n <= context.n_keys:
            raise PolicyUsageError(f"finemoe: n must be 0 to {context.n_keys}, not {n}")
        layers, experts = context.n_layers, context.n_experts
        self.top_k = min(context.top_k, experts)
        self.n = n or self.top_k
        self.distance = min(distance, layers)
        self.n_layers = layers
        self.n_experts = experts
        self.passes = np.zeros(2, np.int64)
        # The pass in progress, and those stored: maps, and the beginnings they had.
        self.map = np.zeros((layers, experts))
        self.beginning = np.zeros(experts)
        self.maps = np.zeros((capacity, layers, experts))
        self.beginnings = np.zeros((capacity, experts))
        self.squares = np.zeros((capacity, layers))  # of the maps' rows up to a layer
        # Rows of the map so far; maps stored; 1 where the pass has a beginning.
        self.known = np.zeros(3, np.int64)
        # Against the pass in progress: products of the rows so far, and that pass's squares.
        self.product = np.zeros(capacity)
        self.own_squares = np.zeros(1)
        self.probability = np.ones(context.n_keys)
        self.wanted_in = np.full(context.n_keys, -1, np.int64)  # the pass it was selected for
        self.visits = np.zeros(context.n_keys)
        self.held = np.zeros(context.n_keys, np.bool_)
        self.spared = np.zeros(context.n_keys, np.bool_)
        self.best = np.zeros(experts, np.int32)

    def on_step(self, step: Step) -> None:
        """Store a pass that has ended, follow the one in progress, and predict."""
        before = self.passes[0]
        if count_pass(self.passes, step) != before:
            self.begin(step.begins_sequence)
        first = step.layer * self.n_experts
        for key in range(first, first + self.n_experts):
            self.spared[key] = False
        for rank in range(len(step.experts)):
            self.visits[step.experts[rank]] += 1.0
        if self.known[0] == step.layer and softmax(step.logits, self.map[step.layer]):
            self.known[0] += 1
            self.follow(step.layer)

    def begin(self, new_text: bool) -> None:
        """Store the last pass if it was whole; predict the first layers by its last gate."""
        whole = self.known[0] == self.n_layers
        if whole and self.known[2] == 1:
            self.store()
        self.known[0] = 0
        self.known[2] = 1 if whole and not new_text else 0
        for i in range(len(self.maps)):
            self.product[i] = 0.0
        self.own_squares[0] = 0.0
        if self.known[2] == 1:
            for e in range(self.n_experts):
                self.beginning[e] = self.map[self.n_layers - 1, e]
            self.predict_first()

    def predict_first(self) -> None:
        """Predict the first layers by the stored pass with the likest beginning."""
        best, most = -1, 0.0
        for i in range(self.known[1]):
            likeness = cosine(self.beginnings[i], self.beginning)
            if best < 0 or likeness > most:
                best, most = i, likeness
        if best >= 0:
            for layer in range(self.distance):
                self.predict(layer, best, most)

    def follow(self, layer: int) -> None:
        """Compare the rows up to ``layer``, and predict the layer ``distance`` ahead."""
        row = self.map[layer]
        for e in range(self.n_experts):
            self.own_squares[0] += row[e] * row[e]
        best, most = -1, 0.0
        for i in range(self.known[1]):
            for e in range(self.n_experts):
                self.product[i] += row[e] * self.maps[i, layer, e]
            likeness = self.product[i] / math.sqrt(self.own_squares[0] * self.squares[i, layer])
            if best < 0 or likeness > most:
                best, most = i, likeness
        if best >= 0 and layer + self.distance < self.n_layers:
            self.predict(layer + self.distance, best, most)

    def predict(self, layer: int, which: int, likeness: float) -> None:
        """Take a layer's probabilities from a stored map, and select its experts."""
        first = layer * self.n_experts
        for e in range(self.n_experts):
            self.probability[first + e] = self.maps[which, layer, e]
        top_n(self.maps[which, layer], self.n_experts, first, self.best)
        mass = 0.0
        for i in range(self.n_experts):
            if i >= self.top_k and mass >= 1.0 - likeness:
                break
            mass += self.probability[self.best[i]]
            self.wanted_in[self.best[i]] = self.passes[0]

    def store(self) -> None:
        """Keep the map of the last pass with its beginning."""
        place = self.known[1]
        if place < len(self.maps):
            self.known[1] += 1
        else:
            place = self.likest()
        for e in range(self.n_experts):
            self.beginnings[place, e] = self.beginning[e]
        squares = 0.0
        for layer in range(self.n_layers):
            for e in range(self.n_experts):
                self.maps[place, layer, e] = self.map[layer, e]
                squares += self.map[layer, e] * self.map[layer, e]
            self.squares[place, layer] = squares

    def likest(self) -> int:
        """The stored pass most like the last one, beginning and rows weighed as layers they are
        used for."""
        share = self.distance / self.n_layers
        best, most = 0, -1.0
        for i in range(len(self.maps)):
            rows = self.product[i] / math.sqrt(self.own_squares[0] * self.squares[i, -1])
            likeness = share * cosine(self.beginnings[i], self.beginning) + (1.0 - share) * rows
            if likeness > most:
                best, most = i, likeness
        return best

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device; a guess is spared until its layer."""
        self.held[key] = True
        self.spared[key] = speculative

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False
        self.spared[key] = False

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The selected experts that are missing, by probability over layers to go."""
        last_layer = min(step.layer + self.distance, self.n_layers - 1)
        n, last, last_urgency = 0, -1, 0.0
        while n < min(self.n, len(keys)):
            found, most = -1, -1.0
            for key in range((step.layer + 1) * self.n_experts, (last_layer + 1) * self.n_experts):
                if self.held[key] or self.wanted_in[key] != self.passes[0]:
                    continue
                urgency = self.probability[key] / (key // self.n_experts - step.layer)
                behind = last < 0 or urgency < last_urgency
                behind = behind or (urgency == last_urgency and key > last)
                if behind and urgency > most:
                    found, most = key, urgency
            if found < 0:
                break
            keys[n] = found
            n += 1
            last, last_urgency = found, most
        return n

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least probability x visits; for a guess none that is spared."""
        guess = layer != self.passes[1]
        best, least = -1, 0.0
        for i in range(len(candidates)):
            key = candidates[i]
            score = self.probability[key] * self.visits[key]
            if not (guess and self.spared[key]) and (best < 0 or score < least):
                best, least = int(key), score
        return best


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Of two vectors of probabilities."""
    product, squares, others = 0.0, 0.0, 0.0
    for i in range(len(one)):
        product += one[i] * other[i]
        squares += one[i] * one[i]
        others += other[i] * other[i]
    return product / math.sqrt(squares * others)
