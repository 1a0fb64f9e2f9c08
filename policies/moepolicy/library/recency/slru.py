"""Segmented LRU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.lists import NEWER, Queues, check_share
from moepolicy.policy import Context


class Slru(Queues):
    """Evict the least recent of those used once; those used again are protected, within limits.

    Segmented LRU (Karedla, Love and Wherry, "Caching Strategies to Improve Disk System
    Performance", 1994). ``protected`` is the protected segment's share of the cache; what is
    displaced from it becomes the most recent on probation.
    """

    def __init__(self, context: Context, protected: float = 0.8) -> None:
        super().__init__(context, 2)
        check_share("slru", "protected", protected)
        self.n_protected = int(self.capacity * protected)

    def on_hit(self, key: int, now: int) -> None:
        """Move the key to the end of the protected segment; its oldest may go back on probation."""
        probation, protected = self.head(key, 0), self.head(key, 1)
        again = not self.guessed[key]
        self.guessed[key] = False
        self.leave(key)
        self.enter(key, protected if again else probation, now)
        if self.length[protected] > self.n_protected:
            oldest = self.links[protected, NEWER]
            self.leave(oldest)
            self.append(oldest, probation)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Put the key at the end of probation."""
        self.guessed[key] = speculative
        self.enter(key, self.head(key, 0), now)

    def on_evict(self, key: int) -> None:
        """Take the key out of its segment."""
        self.leave(key)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The oldest candidate on probation, else the oldest protected one."""
        every = self.all_may_go(incoming, 2, candidates)
        key = self.oldest_of(self.head(incoming, 0), every, candidates)
        return key if key >= 0 else self.oldest_of(self.head(incoming, 1), every, candidates)
