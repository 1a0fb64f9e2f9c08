"""Eviction that knows the trace's future: the limits other policies are measured against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import NO_USE, Context, Policy, PolicyError
from moepolicy.selection import highest
from moepolicy.steps import Step


def next_use(keys: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The step that next uses each demanded key; ``NO_USE`` where none does.

    ``keys[offsets[s]:offsets[s + 1]]`` is step ``s``'s demand, each key once.
    """
    steps = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((steps, keys))
    following = np.full(len(keys), NO_USE, np.int64)
    same = keys[order[1:]] == keys[order[:-1]]
    following[order[:-1][same]] = steps[order[1:][same]]
    return following


class Belady(Policy):
    """Evict the expert whose next use is farthest (Belady's MIN over whole steps, no bypass)."""

    requires = frozenset({"future"})

    def __init__(self, context: Context) -> None:
        if context.next_use is None or context.offsets is None:
            raise PolicyError(
                "policy 'belady' needs the future of a recorded trace: it runs in moesim, not live"
            )
        self.next_use = context.next_use
        self.offsets = context.offsets
        self.due = np.full(context.n_layers * context.n_experts, NO_USE, np.int64)

    def on_step(self, step: Step) -> None:
        first = self.offsets[step.number]
        for rank in range(len(step.experts)):
            self.due[step.experts[rank]] = self.next_use[first + rank]

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        return highest(self.due, candidates)


class BeladyBypass(Policy):
    """Keep, of the cache and the step's experts, those used soonest; the rest pass by staging.

    The fewest loads any policy can have. An expert that should replace one which this very step
    uses waits in staging until the step's pins drop, so there are buffers for the widest step.
    """

    requires = frozenset({"future"})

    def __init__(self, context: Context) -> None:
        if context.next_use is None or context.offsets is None:
            raise PolicyError(
                "policy 'belady-bypass' needs the future of a recorded trace: it runs in moesim, "
                "not live"
            )
        n_keys = context.n_layers * context.n_experts
        self.staging = int(np.diff(context.offsets).max())
        self.next_use = context.next_use
        self.offsets = context.offsets
        self.due = np.full(n_keys, NO_USE, np.int64)
        self.cached = np.zeros(n_keys, np.bool_)
        self.wanted = np.zeros(context.n_experts, np.int32)
        self.n_wanted = np.zeros(1, np.int64)

    def on_step(self, step: Step) -> None:
        first = self.offsets[step.number]
        self.n_wanted[0] = len(step.experts)
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            self.wanted[rank] = key
            self.due[key] = self.next_use[first + rank]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        self.cached[key] = True

    def on_evict(self, key: int) -> None:
        self.cached[key] = False

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        farthest = highest(self.due, candidates)
        if self.due[incoming] >= self.due[farthest]:
            return -1
        for rank in range(self.n_wanted[0]):
            key = self.wanted[rank]
            if self.cached[key] and self.due[key] > self.due[farthest]:
                return -1  # that one goes instead, once its pin has dropped: see retain
        return farthest

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        farthest = highest(self.due, candidates)
        return farthest if self.due[key] < self.due[farthest] else -1
