"""SIEVE: a hand that passes over a queue of loads and spares what was used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.lists import NEWER, Queues, among
from moepolicy.policy import Context


class Sieve(Queues):
    """Evict the first expert unused since the hand's last round, which leaves the rest in place.

    SIEVE: Zhang et al., NSDI 2024.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context, 1)
        self.used = np.zeros(self.n_keys, np.bool_)  # since its load or the hand's last round
        # Where the hand of each head rests: on a key, or on the head once it is past the newest.
        self.hand = np.arange(len(self.links))

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
        """Take the key out of the queue; a hand that rests on it moves on."""
        head = self.head(key, 0)
        if self.hand[head] == key:
            self.hand[head] = self.links[key, NEWER]
        self.leave(key)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The first unused candidate from the hand on, which makes those before it unused."""
        head = self.head(incoming, 0)
        every = self.all_may_go(incoming, 1, candidates)
        key = self.hand[head]
        while key == head or self.used[key] or not (every or among(candidates, key)):
            if key != head and (every or among(candidates, key)):
                self.used[key] = False
            key = self.links[key, NEWER]
        self.hand[head] = key
        return int(key)
