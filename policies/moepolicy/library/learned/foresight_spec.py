"""Foresight with prefetching: a guess is fetched where it should save more than it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.learned.foresight import HABIT, PAIRS, RECENT
from moepolicy.library.learned.foresight_fetch import ForesightFetching
from moepolicy.library.probabilities import is_predicted
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step

AHEAD = 3  # layers
BINS = 16  # of margins
BIN_WIDTH = 0.25
BELOW = 4  # bins of margins below the boundary
# How often guesses come true, by distance and bin, before any has: as on the development stretches
# of the bundled model, of prose and code alike. Each counts as so many guesses.
BEGIN = np.array(
    [
        [3, 7, 11, 26, 48, 70, 80, 86, 87, 90, 90, 91, 91, 93, 93, 96],
        [6, 8, 14, 25, 41, 57, 69, 74, 82, 85, 87, 87, 87, 88, 88, 94],
        [7, 11, 16, 23, 33, 48, 57, 67, 73, 78, 80, 80, 80, 86, 88, 92],
    ]
)  # %
BELIEVED = 8.0
GATES = 0.05  # layers that asking the gates takes where nobody knows
SURE = 1.25  # what asking saves is to be so many times what it takes
BEGINNING = 24  # passes at first whose gates are all asked
ASKED_AGAIN = 128  # passes after which gates that are asked no more are asked again, for one pass
TRIAL = 8  # passes for which they are asked where that one paid
OWN_RATE, ALL_RATE = 0.05, 0.01  # of what is known of a layer's own saving, and of all layers'


class ForesightSpec(ForesightFetching):
    """foresight-bypass that fetches what later gates predict, where that pays.

    The gates of the next three layers are read. A guess is an expert that is not on the device,
    and its margin is how far its logit lies above the boundary of the choice, the middle between
    the logits of rank ``top_k`` and the next, in mean absolute deviations of the row. How often a
    guess comes true is counted by margin, for each layer and each distance.

    A copy takes `copy_over_layer` layers of compute, or 10 where that is unknown. The policy
    estimates how long compute goes on until some layer has to load an expert, from how often each
    layer had nothing to load. A right guess saves the compute that its copy overlaps up to the
    guess's layer. A wrong guess costs the rest of its copy, which the next load waits for, and some
    of the link's time; none of it where the copy has ended before the next gate speaks. A guess is
    fetched where its chance times the first is more than its risk times the second, the best ones
    first, each behind those before it and behind the copies under way. Guesses wait in the
    ``staging`` buffers, or in slots that are free.

    Asking the gates takes compute itself, `gates_over_layer` layers. While what the fetches of a
    layer are expected to save is less than that, its gates are not asked, after the first 24 passes
    and but for every 128th. That one begins a trial of 8 passes where it would have paid.

    The class is long because what is guessed, what is fetched and what is asked share the counts
    that each of them keeps.
    """

    requires = frozenset({"predictions"})
    horizon = AHEAD

    def __init__(
        self,
        context: Context,
        discount: float = 0.87,
        rate: float = 0.003,
        reach: int = 0,
        pairs: int = PAIRS,
        habit: float = HABIT,
        recent: float = RECENT,
        staging: int = 4,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        if staging < 1:
            raise PolicyUsageError(f"foresight-spec: staging must be 1 or more, not {staging}")
        super().__init__(
            context,
            BEGIN / 100.0,
            BELIEVED,
            staging,
            discount=discount,
            rate=rate,
            reach=reach,
            pairs=pairs,
            habit=habit,
            recent=recent,
            params=params,
        )
        layers, experts = context.n_layers, context.n_experts
        self.likeliest = np.zeros(min(2 * self.top_k, experts), np.int32)
        # Whether asking the gates pays: layers of compute saved by it, a step.
        known = float(context.gates_over_layer)
        self.gates = SURE * (GATES if math.isnan(known) else known)
        self.saves = np.zeros(layers)
        self.all_save = np.zeros(1)
        self.n_passes = np.zeros(1, np.int64)
        self.until = np.full(1, BEGINNING + 1)  # the pass before which all gates are asked
        self.of_pass = np.zeros(2)  # steps at which gates were asked, and what they saved
        self.fetched = np.zeros(context.n_keys, np.bool_)  # asked for, and its gate yet to speak

    def on_step(self, step: Step) -> None:
        """Learn from what is used, and from the guesses about it."""
        self.settle(step)
        layer = step.layer
        first = layer * self.n_experts
        for key in range(first, first + self.n_experts):
            self.fetched[key] = False
        if layer == 0:
            self.begin_pass()

    def begin_pass(self) -> None:
        """Ask for some passes more where the gates of the last one, asked again, paid."""
        if self.n_passes[0] % ASKED_AGAIN == 0 and self.of_pass[0] > 0:
            mean = self.of_pass[1] / self.of_pass[0]
            if mean > self.gates:
                self.until[0] = max(self.until[0], self.n_passes[0] + 1 + TRIAL)
                self.all_save[0] = max(self.all_save[0], mean)
        if self.n_passes[0] % ASKED_AGAIN == ASKED_AGAIN - 1 and self.of_pass[0] == 0:
            # Nothing was asked in the last pass, and the gates are asked again in the next.
            forget(self.all_guesses, self.all_right, BELIEVED)
            forget(self.guesses, self.right, BELIEVED / 2)
        self.of_pass[:] = 0.0
        self.n_passes[0] += 1

    def wants_predictions(self, layer: int) -> bool:
        """While asking later gates saves more than it takes, and now and then to see whether."""
        if layer == self.n_layers - 1:
            return False  # there are none
        coming = self.n_passes[0] + (1 if layer == 0 else 0)
        if coming < self.until[0] or coming % ASKED_AGAIN == 0:
            return True
        return bool(0.5 * (self.saves[layer] + self.all_save[0]) > self.gates)

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The guesses that pay, the best first."""
        if step.tokens != 1 or len(step.predicted) == 0:
            return 0
        for ahead in range(AHEAD):
            if step.layer + 1 + ahead < self.n_layers and is_predicted(step, ahead):
                self.guess(step, ahead)
        begins = self.delay(step)
        n = 0
        saved = 0.0
        while n < self.staging:
            key = self.best(step.layer, begins, keys[:n])
            if key < 0:
                break
            keys[n] = key
            n += 1
            begins += self.copy
            if not self.fetched[key]:
                self.fetched[key] = True
                saved += self.expected[0]
        self.note_saving(step.layer, saved)
        return n

    def note_saving(self, layer: int, saved: float) -> None:
        """What asking the gates at ``layer`` is expected to save of compute, in layers."""
        self.saves[layer] += OWN_RATE * (saved - self.saves[layer])
        self.all_save[0] += ALL_RATE * (saved - self.all_save[0])
        self.of_pass[0] += 1.0
        self.of_pass[1] += saved

    def guess(self, step: Step, ahead: int) -> None:
        """Note the likeliest absent experts of a later layer, and their margins."""
        layer = step.layer + 1 + ahead
        logits = step.predicted[ahead]
        first = layer * self.n_experts
        n = top_n(logits, len(self.likeliest), first, self.likeliest)
        edge = float(logits[self.likeliest[self.top_k - 1] - first])
        if n > self.top_k:
            edge = 0.5 * (edge + float(logits[self.likeliest[self.top_k] - first]))
        mean = 0.0
        for e in range(self.n_experts):
            mean += float(logits[e])
        mean /= self.n_experts
        spread = 0.0
        for e in range(self.n_experts):
            spread += abs(float(logits[e]) - mean)
        spread = max(spread / self.n_experts, 1e-9)
        found = 0
        for i in range(n):
            key = self.likeliest[i]
            if not self.held[key]:
                margin = (float(logits[key - first]) - edge) / spread / BIN_WIDTH + BELOW
                self.open[ahead, layer, found] = key
                self.bin[ahead, layer, found] = int(min(max(margin, 0.0), BINS - 1.0))
                found += 1
        self.n_open[ahead, layer] = found


def forget(guesses: NDArray[np.float64], right: NDArray[np.float64], most: float) -> None:
    """Let no entry count more than ``most`` guesses."""
    for i in range(guesses.size):
        if guesses.flat[i] > most:
            right.flat[i] *= most / guesses.flat[i]
            guesses.flat[i] = most
