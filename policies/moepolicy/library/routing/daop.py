"""DAOP: placed by the prompt; in decoding predicted experts are the routing, misses the CPU's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.library.routing.ahead import RoutesAhead
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step


class Daop(RoutesAhead):
    """Exchange experts by each prompt's counts, then decode without copies (DAOP, 2501.10375).

    Prompt: of each layer the missing expert most used by the prompt's tokens takes the place of the
    one there that is least used, as long as its count is more than ``gain`` times that one's. All
    other misses, and all of decoding's, are computed on the CPU; free slots are filled. Decoding,
    from layer ``first`` on (0 is the first layer): the experts predicted by the layer before are
    the routing; where none of them is there, the best one stays and the others are replaced by the
    best predicted residents.

    A departure: the paper's CPU begins to compute a predicted expert while the layer before runs,
    on that layer's hidden state. Here it begins with its own layer, on its own: the times are an
    upper bound, and what is changed in the text is only the choice of experts.
    """

    requires = frozenset({"cpu", "predictions"})

    def __init__(self, context: Context, gain: float = 1.05, first: int = 4) -> None:
        super().__init__(context)
        if gain < 1 or first < 0:
            raise PolicyUsageError(
                f"daop: gain must be 1 or more, first 0 or more, not {gain} and {first}"
            )
        self.gain = float(gain)
        self.first = first
        self.n_domains = 1 if context.scope == "global" else context.n_layers
        self.width = context.n_keys // self.n_domains  # keys of a domain
        self.slots = np.zeros(1, np.int64)  # of a domain
        self.on_resize(context.slots)
        # A prompt's newcomers wait until its pins drop, and the least used can go.
        self.staging = max(1, min(context.slots, context.n_experts - context.slots))
        self.held = np.zeros(context.n_keys, np.bool_)
        self.n_held = np.zeros(self.n_domains, np.int64)
        self.counts = np.zeros(context.n_keys, np.int64)  # uses by the tokens of the prompt
        self.comes = np.zeros(context.n_keys, np.bool_)
        self.goes = np.zeros(context.n_keys, np.bool_)

    def on_resize(self, slots: int) -> None:
        """A domain has room for so many from now on."""
        n_layers = len(self.eviction_score) // self.n_experts
        self.slots[0] = min(slots, self.n_experts) * (n_layers // self.n_domains)

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """Count a prompt's experts; give a decoded token the predicted ones."""
        if step.tokens > 1:
            if step.begins_sequence and row == 0:
                self.counts[:] = 0
            for i in range(len(chosen)):
                self.counts[step.layer * self.n_experts + chosen[i]] += 1
        elif step.layer >= self.first and self.foresaw(step):
            top_n(self.ahead, len(chosen), 0, chosen)
            self.make_do(resident, chosen)

    def make_do(self, resident: NDArray[np.bool_], chosen: NDArray[np.int32]) -> None:
        """Where none of ``chosen`` is there, replace all but the best by predicted residents."""
        for i in range(len(chosen)):
            if resident[chosen[i]]:
                return
        at = 1
        for e in range(self.n_experts):
            self.ahead[e] = self.ahead[e] if resident[e] else -np.inf
        while at < len(chosen):
            best = 0
            for e in range(1, self.n_experts):
                if self.ahead[e] > self.ahead[best]:
                    best = e
            if self.ahead[best] == -np.inf:
                return
            chosen[at] = best
            self.ahead[best] = -np.inf
            at += 1

    def on_step(self, step: Step) -> None:
        """Choose what a prompt exchanges, or what fills free slots; remember the prediction."""
        first = step.layer * self.n_experts
        for key in range(first, first + self.n_experts):
            self.comes[key] = False
            self.goes[key] = False
        free = self.slots[0] - self.n_held[first // self.width]
        while self.exchange(step, free > 0):
            free -= 1
        self.look_ahead(step)

    def exchange(self, step: Step, free: bool) -> bool:
        """Let one more of the step's missing experts come, if it may."""
        hot = -1
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            missing = not (self.held[key] or self.comes[key])
            if missing and (hot < 0 or self.counts[key] > self.counts[hot]):
                hot = int(key)
        if hot < 0:
            return False
        if not free:
            cold = self.coldest(step.layer)
            if step.tokens == 1 or cold < 0:
                return False
            if self.counts[hot] <= self.gain * self.counts[cold]:
                return False
            self.goes[cold] = True
        self.comes[hot] = True
        return True

    def coldest(self, layer: int) -> int:
        """The layer's expert that is there, does not go yet and is used least; -1: none."""
        cold = -1
        for key in range(layer * self.n_experts, (layer + 1) * self.n_experts):
            stays = self.held[key] and not self.goes[key]
            if stays and (cold < 0 or self.counts[key] < self.counts[cold]):
                cold = key
        return cold

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.eviction_score[key] = now
        self.held[key] = True
        self.n_held[key // self.width] += 1

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False
        self.n_held[key // self.width] -= 1

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD what comes; COMPUTE the others."""
        return LOAD if self.comes[step.experts[rank]] else COMPUTE

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """A candidate that goes; -1 while the step still uses all of those."""
        return self.going(candidates)

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """A candidate that goes; -1 where all of those are gone."""
        return self.going(candidates)

    def going(self, candidates: NDArray[np.int32]) -> int:
        """The first of ``candidates`` that goes; -1 if none does."""
        for i in range(len(candidates)):
            if self.goes[candidates[i]]:
                return int(candidates[i])
        return -1
