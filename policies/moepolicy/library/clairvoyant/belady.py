"""Belady's MIN over whole steps, with and without bypass: the fewest loads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.clairvoyant.future import future_of
from moepolicy.library.selection import highest
from moepolicy.policy import NO_USE, Context, Policy
from moepolicy.scores import ByScore
from moepolicy.steps import Step


class Belady(ByScore):
    """Evict the expert whose next use is farthest (Belady's MIN over whole steps, no bypass)."""

    requires = frozenset({"future"})

    def __init__(self, context: Context) -> None:
        self.next_use, self.offsets = future_of(context, "belady")
        self.eviction_score = np.full(context.n_layers * context.n_experts, -NO_USE, np.int64)

    def on_step(self, step: Step) -> None:
        """Learn when the step's experts are used next: the sooner, the greater the score."""
        first = self.offsets[step.number]
        for rank in range(len(step.experts)):
            self.eviction_score[step.experts[rank]] = -self.next_use[first + rank]


class BeladyBypass(Policy):
    """Keep, of the cache and the step's experts, those used soonest; the rest pass by staging.

    The fewest loads any policy can have. An expert that should replace one which this very step
    uses waits in staging until the step's pins drop, so there are buffers for the widest step.
    """

    requires = frozenset({"future"})

    def __init__(self, context: Context) -> None:
        self.next_use, self.offsets = future_of(context, "belady-bypass")
        n_keys = context.n_layers * context.n_experts
        self.staging = int(np.diff(self.offsets).max())
        self.due = np.full(n_keys, NO_USE, np.int64)
        self.held = np.zeros(n_keys, np.bool_)
        self.wanted = np.zeros(n_keys, np.int32)
        self.now = np.zeros(2, np.int64)  # the step in progress, and how many it wants

    def on_step(self, step: Step) -> None:
        """Learn when the step's experts are used next."""
        self.foresee(step)

    def foresee(self, step: Step) -> None:
        """Learn when the step's experts are used next."""
        first = self.offsets[step.number]
        self.now[0] = step.number
        self.now[1] = len(step.experts)
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            self.wanted[rank] = key
            self.due[key] = self.next_use[first + rank]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose next use is farthest; -1 where another expert is to go."""
        return self.displaced(incoming, candidates)

    def displaced(self, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The key that makes room for one of the step's experts; -1 where that is the farthest."""
        farthest = highest(self.due, candidates)
        if self.due[incoming] >= self.due[farthest]:
            return -1
        for rank in range(self.now[1]):
            key = self.wanted[rank]
            if self.held[key] and self.due[key] > self.due[farthest]:
                return -1  # that one goes instead, once its pin has dropped: see retain
        return farthest

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose next use is farthest; -1 where that of ``key`` is as far."""
        farthest = highest(self.due, candidates)
        return farthest if self.due[key] < self.due[farthest] else -1
