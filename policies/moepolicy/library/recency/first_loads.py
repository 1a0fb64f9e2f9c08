"""Queues that keep first loads apart, with ghosts of what was evicted: 2Q, S3-FIFO."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.lists import NEWER, Queues, among, check_share
from moepolicy.policy import Context

NONE = -1


class FirstLoads(Queues):
    """A list of first loads, one of the others, and of what left the first one, its ghosts.

    ``ghosts`` is how many are remembered, as a share of the cache.
    """

    def __init__(self, context: Context, ghosts: float) -> None:
        super().__init__(context, 3)
        self.n_ghosts = int(self.capacity * ghosts)
        self.recalled = np.full(1, NONE)  # a ghost for which room is being made

    def on_evict(self, key: int) -> None:
        """Take the key out of its list; one of first loads, unless a guess, becomes a ghost."""
        ghosts = self.head(key, 2)
        remember = self.at[key] == self.head(key, 0) and not self.guessed[key]
        self.leave(key)
        if remember:
            self.append(key, ghosts)
            self.trim(ghosts, self.n_ghosts)

    def recall(self, key: int) -> None:
        """Take ``key`` out of the ghosts, if it is one, before room is made for it."""
        if self.at[key] == self.head(key, 2):
            self.leave(key)
            self.recalled[0] = key


class TwoQ(FirstLoads):
    """Evict in the order of loads, unless loaded again soon after: those are kept by recency.

    2Q, the full version (Johnson and Shasha, VLDB 1994): ``first`` is the share of the cache for
    first loads, ``ghosts`` how many evicted ones of these are remembered, as a share of it.
    """

    def __init__(self, context: Context, first: float = 0.25, ghosts: float = 0.5) -> None:
        check_share("2q", "first", first)
        check_share("2q", "ghosts", ghosts)
        super().__init__(context, ghosts)
        self.n_first = int(self.capacity * first)

    def on_hit(self, key: int, now: int) -> None:
        """Move a key of the main list to its end. First loads stay in the order of loads."""
        self.guessed[key] = False
        main = self.head(key, 1)
        if self.at[key] == main:
            self.leave(key)
            self.enter(key, main, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Put a ghost at the end of the main list, any other key at the end of first loads."""
        self.recall(key)
        self.guessed[key] = speculative
        self.enter(key, self.head(key, int(self.recalled[0] == key)), now)
        self.recalled[0] = NONE

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The oldest candidate of first loads while they are over their share, else of the main
        list."""
        self.recall(incoming)
        every = self.all_may_go(incoming, 2, candidates)
        first, main = self.head(incoming, 0), self.head(incoming, 1)
        key = NONE
        if self.length[first] > self.n_first:
            key = self.oldest_of(first, every, candidates)
        if key < 0:
            key = self.oldest_of(main, every, candidates)
        return key if key >= 0 else self.oldest_of(first, every, candidates)


class S3Fifo(FirstLoads):
    """Evict from a small queue of first loads what was not used there twice, before the rest.

    S3-FIFO (Yang et al., SOSP 2023), as its authors' libCacheSim has it: until the cache is full,
    what the small queue has no room for goes to the main one. ``small`` and ``ghosts`` are shares
    of the cache; a small queue has room for one expert at least.
    """

    def __init__(self, context: Context, small: float = 0.1, ghosts: float = 0.9) -> None:
        check_share("s3-fifo", "small", small)
        check_share("s3-fifo", "ghosts", ghosts)
        super().__init__(context, ghosts)
        self.n_small = max(1, int(self.capacity * small))
        self.uses = np.zeros(self.n_keys, np.int64)  # since it entered its queue
        self.full = np.zeros(len(self.links), np.bool_)  # at its head

    def on_hit(self, key: int, now: int) -> None:
        """Count the use. The first use of a guess is its load."""
        if not self.guessed[key]:
            self.uses[key] += 1
        self.guessed[key] = False

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Put a ghost, or what the small queue has no room for, in the main queue; else in the
        small one."""
        self.recall(key)
        small = self.head(key, 0)
        to_main = self.recalled[0] == key or (
            not self.full[small] and self.length[small] >= self.n_small
        )
        self.recalled[0] = NONE
        self.guessed[key] = speculative
        self.uses[key] = 0
        self.enter(key, self.head(key, int(to_main)), now)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """A candidate of the main queue while that is over its share, else of the small one."""
        self.recall(incoming)
        every = self.all_may_go(incoming, 2, candidates)
        small, main = self.head(incoming, 0), self.head(incoming, 1)
        self.full[small] = True
        key = NONE
        if self.length[main] <= self.capacity - self.n_small:
            key = self.from_small(small, main, every, candidates)
        if key < 0:
            key = self.from_main(main, every, candidates)
        return key if key >= 0 else self.from_small(small, main, every, candidates)

    def from_small(self, small: int, main: int, every: bool, candidates: NDArray[np.int32]) -> int:
        """The oldest of the small queue used less than twice; the others move on. -1: none."""
        key = self.links[small, NEWER]
        while key != small:
            newer = self.links[key, NEWER]
            if every or among(candidates, key):
                if self.uses[key] < 2:
                    return int(key)
                self.leave(key)
                self.append(key, main)
                self.uses[key] = 0
            key = newer
        return NONE

    def from_main(self, main: int, every: bool, candidates: NDArray[np.int32]) -> int:
        """The oldest of the main queue that was not used; each use buys a turn. -1: none."""
        key = self.links[main, NEWER]
        while key != main:
            newer = self.links[key, NEWER]
            if every or among(candidates, key):
                if self.uses[key] == 0:
                    return int(key)
                self.uses[key] = min(self.uses[key], 3) - 1
                self.leave(key)
                self.append(key, main)
                newer = key if newer == main else newer
            key = newer
        return NONE
