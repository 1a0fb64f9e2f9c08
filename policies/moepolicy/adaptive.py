"""A policy that is one of two, as a condition on the last steps says."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.aspects import aspects_of, declared, name_of
from moepolicy.policy import Policy
from moepolicy.steps import Step

# What a condition compares.
OF_HITS = 0
OF_LATE = 1
OF_MISSES = 2
OF_BACKLOG = 3


class Adaptive(Policy):
    """One policy, or another while a condition holds; both are told of everything.

    After every ``window`` steps the condition compares what these steps came to with ``than``: the
    share of hits, late hits or misses in all demanded experts, or the mean backlog. The decisions
    of the steps until the next comparison are those of ``other`` where it holds, else of ``base``.
    """

    def __init__(
        self, base: Policy, other: Policy, metric: int, above: bool, than: float, window: int
    ) -> None:
        self.base = base
        self.other = other
        self.metric = metric
        self.above = above
        self.than = float(than)
        self.window = window
        self.chosen = np.zeros(1, np.int64)  # 1: other
        self.before = np.zeros(3, np.int64)  # hits, late, misses when the window began
        self.seen = np.zeros(2, np.int64)  # steps of the window, and the sum of their backlogs
        self.staging = max(base.staging, other.staging)
        prefetcher = base if "prefetching" in aspects_of(type(base)) else other
        self.stage_prefetches = prefetcher.stage_prefetches
        self.fills_slots = prefetcher.fills_slots
        self.base_reads = "predictions" in base.requires
        self.other_reads = "predictions" in other.requires

    @property
    def parts(self) -> tuple[Policy, Policy]:
        """What it is made of."""
        return self.base, self.other

    def on_step(self, step: Step) -> None:
        """Tell both; at the end of a window, compare."""
        if self.seen[0] == self.window:
            self.compare(step)
        self.seen[0] += 1
        self.seen[1] += step.backlog
        self.base.on_step(step)
        self.other.on_step(step)

    def compare(self, step: Step) -> None:
        """Choose who answers from now on, and begin another window."""
        hits = step.hits - self.before[0]
        late = step.late - self.before[1]
        misses = step.misses - self.before[2]
        total = max(hits + late + misses, 1)
        value = self.seen[1] / self.seen[0]
        if self.metric == OF_HITS:
            value = hits / total
        elif self.metric == OF_LATE:
            value = late / total
        elif self.metric == OF_MISSES:
            value = misses / total
        holds = value > self.than if self.above else value < self.than
        self.chosen[0] = 1 if holds else 0
        self.before[0], self.before[1], self.before[2] = step.hits, step.late, step.misses
        self.seen[:] = 0

    def on_hit(self, key: int, now: int) -> None:
        """Tell both."""
        self.base.on_hit(key, now)
        self.other.on_hit(key, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Tell both."""
        self.base.on_load(key, speculative, now)
        self.other.on_load(key, speculative, now)

    def on_evict(self, key: int) -> None:
        """Tell both."""
        self.base.on_evict(key)
        self.other.on_evict(key)

    def on_resize(self, slots: int) -> None:
        """Tell both."""
        self.base.on_resize(slots)
        self.other.on_resize(slots)

    def wants_predictions(self, layer: int) -> bool:
        """Whether one that reads predictions wants them, chosen or not: it goes on learning."""
        if self.base_reads and self.base.wants_predictions(layer):
            return True
        return self.other_reads and self.other.wants_predictions(layer)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.victim(layer, incoming, candidates)
        return self.base.victim(layer, incoming, candidates)

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.retain(layer, key, candidates)
        return self.base.retain(layer, key, candidates)


class AdaptiveMisses(Adaptive):
    """What becomes of a miss is chosen, too."""

    def on_miss(self, step: Step, rank: int) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.on_miss(step, rank)
        return self.base.on_miss(step, rank)

    def precision(self, step: Step, rank: int) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.precision(step, rank)
        return self.base.precision(step, rank)

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.substitute(step, rank, candidates)
        return self.base.substitute(step, rank, candidates)


class AdaptivePrefetching(Adaptive):
    """What to fetch ahead is chosen, too."""

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The answer of whoever is chosen."""
        if self.chosen[0]:
            return self.other.prefetch(step, keys)
        return self.base.prefetch(step, keys)


class AdaptiveRouting(Adaptive):
    """Which experts a token gets is chosen, too."""

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The choice of whoever is chosen."""
        if self.chosen[0]:
            self.other.route(step, row, resident, chosen)
        else:
            self.base.route(step, row, resident, chosen)


_CHOSEN: dict[str, type[Adaptive]] = {
    "misses": AdaptiveMisses,
    "prefetching": AdaptivePrefetching,
    "routing": AdaptiveRouting,
}


@cache
def adaptive_class(base: Any, other: Any) -> type[Adaptive]:
    """The class whose objects choose between one of the class ``base`` and one of ``other``."""
    both = aspects_of(base) | aspects_of(other)
    chosen = tuple(cls for aspect, cls in _CHOSEN.items() if aspect in both)
    about = declared(base, other)
    about["__qualname__"] = f"Adaptive__{about['__qualname__']}"
    return type("Adaptive_" + name_of(base, other), chosen or (Adaptive,), about)
