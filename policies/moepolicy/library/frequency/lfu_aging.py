"""LFU with dynamic aging."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError


class LfuAging(Policy):
    """Evict the expert used least while cached, where what was evicted raises the newcomers' start.

    LFU with dynamic aging (Arlitt et al., "Evaluating Content Management Techniques for Web Proxy
    Caches", 2000): an expert's worth is its uses since its load plus the worth of the latest
    victim at that use. ``aging=0`` leaves the latter out: LFU that forgets what it evicts. Of
    equals the one that reached its worth first goes.
    """

    always_evicts = True

    def __init__(self, context: Context, aging: int = 1) -> None:
        if aging not in (0, 1):
            raise PolicyUsageError(f"lfu-aging: aging must be 0 or 1, not {aging}")
        n_domains = 1 if context.scope == "global" else context.n_layers
        self.width = context.n_keys // n_domains
        self.aging = aging
        self.uses = np.zeros(context.n_keys, np.int64)
        self.worth = np.zeros(context.n_keys, np.int64)
        self.used = np.zeros(context.n_keys, np.int64)
        self.age = np.zeros(n_domains, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Count the use."""
        self.count(key, 1, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count from 0 again, beginning with the use that the load is for; a guess is none."""
        self.uses[key] = 0
        self.count(key, 0 if speculative else 1, now)

    def count(self, key: int, uses: int, now: int) -> None:
        """Add ``uses`` to the count of ``key`` and renew its worth and its time of use."""
        self.uses[key] += uses
        self.worth[key] = self.uses[key] + self.age[key // self.width]
        self.used[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of least worth; of equals the one that reached it first."""
        least = first_of(self.worth, self.used, candidates)
        if self.aging:
            self.age[least // self.width] = self.worth[least]
        return least


def first_of(
    score: NDArray[np.int64], then: NDArray[np.int64], candidates: NDArray[np.int32]
) -> int:
    """The candidate with the smallest score; of equals, with the smallest of ``then``."""
    best = candidates[0]
    for i in range(1, len(candidates)):
        key = candidates[i]
        if score[key] < score[best] or (score[key] == score[best] and then[key] < then[best]):
            best = key
    return int(best)
