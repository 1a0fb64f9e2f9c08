"""Foresight with prefetching by what it has seen follow: no gate has to be asked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.learned.foresight import HABIT, PAIRS, RECENT
from moepolicy.library.learned.foresight_fetch import ForesightFetching
from moepolicy.library.passes import count_pass
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step

LAYERS_ON = 2  # layers
SHARE_BINS = 20  # of shares, finer towards 0
UNSEEN = 4.0  # uses of an expert with nothing known after them, that are added to those seen
LIKELIEST = 4  # absent experts of a layer, the likeliest
BELIEVED_SHARES = 8.0  # guesses that a bin begins with
TRUE_OF_LAST = 0.8  # of them that come true, in the last bin; in proportion in those before


class ForesightAhead(ForesightFetching):
    """foresight-bypass that fetches what has followed the last layers' experts, where that pays.

    Counts of which experts of a layer followed each expert one and two layers before, of decoded
    tokens, give a share for each expert of the next two layers: the mean over the last layers'
    experts. Guesses are the four absent experts of a layer with the greatest shares. How often a
    guess comes true is counted by its share, and it is fetched where foresight-spec would fetch it:
    where its chance times the compute that its copy overlaps is more than the risk times what a
    wrong copy makes others wait. Where a copy takes less than 0.8 of a layer, and nothing waits,
    that is always. Guesses wait in the ``staging`` buffers, or in slots that are free.

    Neither predictions nor logits are read: it runs on every trace and asks no gate. `moesim fit
    foresight-ahead` keeps the counts, too.
    """

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
        unseen: float = UNSEEN,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        if staging < 1:
            raise PolicyUsageError(f"foresight-ahead: staging must be 1 or more, not {staging}")
        if not unseen > 0:
            raise PolicyUsageError(f"foresight-ahead: unseen must be more than 0, not {unseen}")
        begin = np.tile(np.linspace(0.0, TRUE_OF_LAST, SHARE_BINS), (LAYERS_ON, 1))
        super().__init__(
            context,
            begin,
            BELIEVED_SHARES,
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
        self.unseen = float(unseen)
        self.passes = np.zeros(2, np.int64)
        self.of_pass = np.full(layers, -1, np.int64)  # a layer's last step, if of one token
        # [back, layer, expert `back` + 1 layers before, expert]: tokens that used both.
        self.together = np.zeros((LAYERS_ON, layers, experts, experts), np.float32)
        self.seen = np.zeros((LAYERS_ON, layers, experts))  # that used the former
        self.share = np.zeros(experts)
        if params is not None:
            self.together[:] = params["together"]
            self.seen[:] = params["seen"]

    def learned(self) -> dict[str, NDArray[Any]]:
        """The weights and counts as they are now."""
        return {
            "weight": self.weight.copy(),
            "bias": self.bias.copy(),
            "together": self.together.copy(),
            "seen": self.seen.copy(),
        }

    def on_step(self, step: Step) -> None:
        """Learn from what is used, from the guesses about it, and what it followed."""
        layer = step.layer
        now = count_pass(self.passes, step)
        if step.tokens == 1:
            for back in range(LAYERS_ON):
                if self.follows(layer, back):
                    self.count_together(step, back)
        self.of_pass[layer] = now if step.tokens == 1 else -1
        self.settle(step)

    def follows(self, layer: int, back: int) -> bool:
        """Whether this pass had one token's step at the layer ``back`` + 1 before ``layer``."""
        before = layer - 1 - back
        return bool(before >= 0 and self.of_pass[before] == self.passes[0])

    def count_together(self, step: Step, back: int) -> None:
        """Count the step's experts as those that followed the earlier layer's."""
        layer = step.layer
        before = layer - 1 - back
        for i in range(self.n_newest[before]):
            earlier = self.newest[before, i]
            self.seen[back, layer, earlier] += 1.0
            for rank in range(len(step.experts)):
                expert = step.experts[rank] - layer * self.n_experts
                self.together[back, layer, earlier, expert] += 1.0

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The guesses that pay, the best first; none for a prompt."""
        if step.tokens != 1:
            return 0
        for ahead in range(LAYERS_ON):
            if step.layer + 1 + ahead < self.n_layers:
                self.guess(step.layer + 1 + ahead, ahead)
        begins = self.delay(step)
        n = 0
        while n < self.staging:
            key = self.best(step.layer, begins, keys[:n])
            if key < 0:
                break
            keys[n] = key
            n += 1
            begins += self.copy
        return n

    def guess(self, layer: int, ahead: int) -> None:
        """Note the absent experts of a layer, ``ahead`` + 1 later, with the greatest shares."""
        self.add_shares(layer, ahead)
        first = layer * self.n_experts
        np.subtract(self.share, self.held[first : first + self.n_experts], self.share)
        found = 0
        while found < min(LIKELIEST, self.open.shape[2]):
            best = int(np.argmax(self.share))
            if self.share[best] < 0.0:
                break  # the others are held
            wide = min(2.0 * self.share[best], 1.0)
            self.open[ahead, layer, found] = first + best
            self.bin[ahead, layer, found] = min(
                int(wide * (2.0 - wide) * SHARE_BINS), SHARE_BINS - 1
            )
            self.share[best] = -1.0
            found += 1
        self.n_open[ahead, layer] = found

    def add_shares(self, layer: int, ahead: int) -> None:
        """The mean share, by the experts of the layers from ``ahead`` + 1 before on."""
        told = 0
        for back in range(ahead, LAYERS_ON):
            if self.follows(layer, back):
                told += self.n_newest[layer - 1 - back]
        self.share[:] = 0.0
        for back in range(ahead, LAYERS_ON):
            if self.follows(layer, back):
                before = layer - 1 - back
                for i in range(self.n_newest[before]):
                    earlier = self.newest[before, i]
                    each = 1.0 / ((self.seen[back, layer, earlier] + self.unseen) * told)
                    np.multiply(self.together[back, layer, earlier], each, self.scratch)
                    np.add(self.share, self.scratch, self.share)
