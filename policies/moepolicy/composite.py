"""One policy made of two: an eviction rule and a prefetcher."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Policy
from moepolicy.steps import Step


class Composite(Policy):
    """Two policies as one: ``eviction`` chooses victims, ``prefetcher`` names keys to fetch ahead,
    and both are told of everything."""

    def __init__(self, eviction: Policy, prefetcher: Policy) -> None:
        self.eviction = eviction
        self.prefetcher = prefetcher
        self.staging = max(eviction.staging, prefetcher.staging)
        self.stage_prefetches = prefetcher.stage_prefetches

    @property
    def parts(self) -> tuple[Policy, Policy]:
        """The eviction rule and the prefetcher."""
        return self.eviction, self.prefetcher

    def on_step(self, step: Step) -> None:
        """Tell both parts."""
        self.eviction.on_step(step)
        self.prefetcher.on_step(step)

    def on_hit(self, key: int, now: int) -> None:
        """Tell both parts."""
        self.eviction.on_hit(key, now)
        self.prefetcher.on_hit(key, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Tell both parts."""
        self.eviction.on_load(key, speculative, now)
        self.prefetcher.on_load(key, speculative, now)

    def on_evict(self, key: int) -> None:
        """Tell both parts."""
        self.eviction.on_evict(key)
        self.prefetcher.on_evict(key)

    def on_resize(self, slots: int) -> None:
        """Tell both parts."""
        self.eviction.on_resize(slots)
        self.prefetcher.on_resize(slots)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The eviction rule's answer."""
        return self.eviction.victim(layer, incoming, candidates)

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The eviction rule's answer."""
        return self.eviction.retain(layer, key, candidates)

    def on_miss(self, step: Step, rank: int) -> int:
        """The eviction rule's answer."""
        return self.eviction.on_miss(step, rank)

    def precision(self, step: Step, rank: int) -> int:
        """The eviction rule's answer."""
        return self.eviction.precision(step, rank)

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The eviction rule's answer."""
        return self.eviction.substitute(step, rank, candidates)

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The prefetcher's answer."""
        return self.prefetcher.prefetch(step, keys)
