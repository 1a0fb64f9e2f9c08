"""What a guess of foresight is worth: fetched where it should save more than it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.learned.foresight import HABIT, PAIRS, RECENT, ForesightBypass
from moepolicy.policy import Context
from moepolicy.steps import Step

POOLED = 8.0  # guesses of all layers that a layer's own are weighed against
OWN_KEPT, ALL_KEPT = 128.0, 1024.0  # guesses that a bin of a layer counts, and one of all layers
CALM_RATE = 0.02
LONG = 10.0  # layers that a copy takes where nobody knows: about as on most cards, by Mixtral
LONGEST = 64.0  # layers that a copy takes, at most: what a longer one may cost is no different
BUSY = 0.15  # of a wrong copy's time is lost to later copies, besides what the next load waits
AFTER_A_LOAD = 0.4  # of a layer's time is over when the layer's last load has come
SOON = 0.8  # of a layer: a copy that has ended by then keeps no load waiting


class ForesightFetching(ForesightBypass):
    """foresight-bypass with guesses of what later layers use, each with a chance.

    A class below puts guesses into ``open`` with the ``bin`` of their evidence. How often a guess
    of a bin comes true is counted for each layer and each distance; the counts begin with
    ``believed`` guesses a bin, of which the shares ``begin`` [distances, bins] came true.

    A copy takes `copy_over_layer` layers of compute, or 10 where that is unknown. The policy
    estimates how long compute goes on until some layer has to load an expert, from how often each
    layer had nothing to load. A right guess saves the compute that its copy overlaps up to the
    guess's layer. A wrong guess costs the rest of its copy, which the next load waits for, and some
    of the link's time; it costs nothing where its copy has ended before the next layer's gate
    speaks. A guess is fetched where its chance times the first is more than its risk times the
    second.
    """

    welcomes = frozenset({"speed"})
    fills_slots = True

    def __init__(
        self,
        context: Context,
        begin: NDArray[np.float64],
        believed: float,
        staging: int,
        discount: float = 0.87,
        rate: float = 0.003,
        reach: int = 0,
        pairs: int = PAIRS,
        habit: float = HABIT,
        recent: float = RECENT,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        super().__init__(context, discount, rate, reach, pairs, habit, recent, params)
        layers, experts = context.n_layers, context.n_experts
        self.staging = staging
        self.n_layers = layers
        self.ahead, bins = begin.shape  # layers, and bins of evidence
        speed = float(context.copy_over_layer)
        self.copy = LONG if math.isnan(speed) else min(speed, LONGEST)
        self.calm = np.full(layers, 0.5)  # share of a layer's steps that load nothing
        self.n_missing = np.zeros(1, np.int64)  # of the step in progress
        self.right = np.zeros((self.ahead, layers, bins))
        self.guesses = np.zeros((self.ahead, layers, bins))
        self.all_right = begin * believed
        self.all_guesses = np.full((self.ahead, bins), float(believed))
        # The guesses of each layer whose gate has not spoken yet, by distance.
        most = min(2 * self.top_k, experts)
        self.open = np.zeros((self.ahead, layers, most), np.int32)
        self.bin = np.zeros((self.ahead, layers, most), np.int64)
        self.n_open = np.zeros((self.ahead, layers), np.int64)
        self.idle = np.zeros(self.ahead + 1)
        self.expected = np.zeros(1)

    def settle(self, step: Step) -> None:
        """Learn from what is used, and from the guesses about it."""
        n_missing = 0
        for rank in range(len(step.experts)):
            n_missing += not self.held[step.experts[rank]]
        self.n_missing[0] = n_missing
        self.foresee(step)
        self.remember(step)
        layer = step.layer
        self.calm[layer] += CALM_RATE * ((1.0 if n_missing == 0 else 0.0) - self.calm[layer])
        for ahead in range(self.ahead):
            for i in range(self.n_open[ahead, layer]):
                used = self.used[self.open[ahead, layer, i] - layer * self.n_experts]
                at = self.bin[ahead, layer, i]
                count(self.guesses[ahead, layer], self.right[ahead, layer], at, used, OWN_KEPT)
                count(self.all_guesses[ahead], self.all_right[ahead], at, used, ALL_KEPT)
            self.n_open[ahead, layer] = 0

    def delay(self, step: Step) -> float:
        """Layers of compute until a copy asked for now can start."""
        before = float(step.backlog)
        if self.n_missing[0] > 0:
            # Compute waits for the copy under way and for the step's own.
            return AFTER_A_LOAD + max(before - 1.0, 0.0) * self.copy
        return max(before - 0.5, 0.0) * self.copy

    def best(self, layer: int, begins: float, taken: NDArray[np.int32]) -> int:
        """The guess that is expected to save most beyond its cost; -1 where none does."""
        risk = self.overlaps(layer, begins) + BUSY * self.copy
        if begins + self.copy <= SOON:
            risk = 0.0
        found, most = -1, 0.0
        self.expected[0] = 0.0
        for ahead in range(min(self.ahead, self.n_layers - 1 - layer)):
            later = layer + 1 + ahead
            for i in range(self.n_open[ahead, later]):
                key = int(self.open[ahead, later, i])
                chance = self.chance(ahead, later, self.bin[ahead, later, i])
                gain = chance * self.idle[ahead + 1] - (1.0 - chance) * risk
                if gain > most and not among_first(taken, key):
                    found, most = key, gain
        self.expected[0] = most
        return found

    def chance(self, ahead: int, layer: int, at: int) -> float:
        """How often guesses of such a bin came true."""
        pooled = self.all_right[ahead, at] / self.all_guesses[ahead, at]
        right = self.right[ahead, layer, at] + POOLED * pooled
        return float(right / (self.guesses[ahead, layer, at] + POOLED))

    def overlaps(self, layer: int, begins: float) -> float:
        """Into ``idle``, by layers ahead: the compute that a copy overlaps up to there, in layers.

        The copy starts ``begins`` layers from now, if nothing has to be loaded until then. Returns
        what of the copy is expected to be left when something has to be loaded."""
        ends = begins + self.copy
        lasts = 1.0  # the chance that nothing has to be loaded before
        starts, whole = 0.0, 0.0
        for i in range(self.ahead + 1):
            self.idle[i] = 0.0
        at = 0
        while at < ends:
            if at <= begins < at + 1:
                starts = lasts
            whole += lasts * max(min(ends, at + 1.0) - max(begins, float(at)), 0.0)
            at += 1
            if at <= self.ahead:
                self.idle[at] = whole
            lasts *= self.calm[(layer + at) % self.n_layers]
        for i in range(at + 1, self.ahead + 1):
            self.idle[i] = whole
        return starts * self.copy - whole


def count(
    guesses: NDArray[np.float64], right: NDArray[np.float64], at: int, came: bool, most: float
) -> None:
    """Count a guess in bin ``at``. Where there are ``most``, all of the bin count half from now on:
    what was learned from another text is outweighed in time."""
    if guesses[at] >= most:
        guesses[at] *= 0.5
        right[at] *= 0.5
    guesses[at] += 1.0
    if came:
        right[at] += 1.0


def among_first(keys: NDArray[np.int32], key: int) -> bool:
    """Whether ``key`` is one of ``keys``."""
    found = False
    for i in range(len(keys)):
        found = found or keys[i] == key
    return found
