"""CLOCK: loads in order, with a second chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.lists import NEWER, Queues, among
from moepolicy.policy import Context


class Clock(Queues):
    """Evict in the order of loads, but give an expert used since another turn.

    The second chance of Corbató, "A Paging Experiment with the Multics System" (1968).
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context, 1)
        self.used = np.zeros(self.n_keys, np.bool_)  # since its load or its last turn

    def on_hit(self, key: int, now: int) -> None:
        """Mark the key as used. The first use of a guess is its load."""
        self.used[key] = not self.guessed[key]
        self.guessed[key] = False

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Put the key at the end of the queue, unused."""
        self.used[key] = False
        self.guessed[key] = speculative
        self.enter(key, self.head(key, 0), now)

    def on_evict(self, key: int) -> None:
        """Take the key out of the queue."""
        self.leave(key)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The first unused candidate in the queue; those before it go to the queue's end."""
        head = self.head(incoming, 0)
        every = self.all_may_go(incoming, 1, candidates)
        key = self.links[head, NEWER]
        # What is pinned keeps its place. What is spared goes to the end unused: it ends there.
        while self.used[key] or not (every or among(candidates, key)):
            newer = self.links[key, NEWER]
            if every or among(candidates, key):
                self.used[key] = False
                self.leave(key)
                self.append(key, head)
                newer = key if newer == head else newer
            key = newer
        return int(key)
