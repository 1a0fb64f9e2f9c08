"""ARC: recency and frequency in a balance that follows the misses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.lists import NOWHERE, Queues
from moepolicy.policy import Context

# ARC's lists: used once or again, in the cache or (ghosts) evicted from it.
ONCE, AGAIN, ONCE_GHOSTS, AGAIN_GHOSTS = 0, 1, 2, 3

NONE = -1


class Arc(Queues):
    """Balance recency and frequency by which of the two would have had what is missing.

    ARC (Megiddo and Modha, FAST 2003) with its lists T1, T2, B1 and B2, and a target for the
    length of T1 that is no whole number.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context, 4)
        self.target = np.zeros(len(self.links))  # at its head
        # A ghost for which room is being made, and which kind it was.
        self.recalled = np.full(1, NONE)
        self.was = np.full(1, NOWHERE)

    def on_hit(self, key: int, now: int) -> None:
        """Move the key to the end of the list of those used again; a guess is used once by then."""
        again = not self.guessed[key] or self.at[key] == self.head(key, AGAIN)
        self.guessed[key] = False
        self.leave(key)
        self.enter(key, self.head(key, AGAIN if again else ONCE), now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Put a ghost in the list of those used again, any other key in that of those used once."""
        self.recall(key)
        self.guessed[key] = speculative
        self.enter(key, self.head(key, AGAIN if self.recalled[0] == key else ONCE), now)
        self.recalled[0] = NONE
        once, ghosts = self.head(key, ONCE), self.head(key, ONCE_GHOSTS)
        again, again_ghosts = self.head(key, AGAIN), self.head(key, AGAIN_GHOSTS)
        self.trim(ghosts, max(self.capacity - self.length[once], 0))
        others = self.length[once] + self.length[ghosts] + self.length[again]
        self.trim(again_ghosts, max(2 * self.capacity - others, 0))

    def on_evict(self, key: int) -> None:
        """Take the key out of its list and, unless a guess, remember it among the list's ghosts."""
        ghosts = ONCE_GHOSTS if self.at[key] == self.head(key, ONCE) else AGAIN_GHOSTS
        self.leave(key)
        if not self.guessed[key]:
            self.append(key, self.head(key, ghosts))

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The oldest candidate used once while these exceed the target, else one used again."""
        return self.choose(incoming, candidates)

    def choose(self, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The victim among ``candidates``, which may be fewer than all that could go."""
        self.recall(incoming)
        every = self.all_may_go(incoming, 2, candidates)
        once, again = self.head(incoming, ONCE), self.head(incoming, AGAIN)
        target = self.target[once]
        to_again = self.recalled[0] == incoming and self.was[0] == self.head(incoming, AGAIN_GHOSTS)
        key = NONE
        if self.length[once] > target or (self.length[once] == target and to_again):
            key = self.oldest_of(once, every, candidates)
        if key < 0:
            key = self.oldest_of(again, every, candidates)
        return key if key >= 0 else self.oldest_of(once, every, candidates)

    def recall(self, key: int) -> None:
        """If ``key`` is a ghost, move the target in favour of its list and take it out."""
        seen_once = self.head(key, ONCE)
        once, again = self.head(key, ONCE_GHOSTS), self.head(key, AGAIN_GHOSTS)
        at = self.at[key]
        if at == once:
            more = max(1.0, self.length[again] / self.length[once])
            self.target[seen_once] = min(float(self.capacity), self.target[seen_once] + more)
        elif at == again:
            less = max(1.0, self.length[once] / self.length[again])
            self.target[seen_once] = max(0.0, self.target[seen_once] - less)
        else:
            return
        self.leave(key)
        self.recalled[0] = key
        self.was[0] = at
