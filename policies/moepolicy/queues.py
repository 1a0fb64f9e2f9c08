"""Eviction by several queues, with a ghost list of what was evicted: SLRU, 2Q, S3-FIFO, ARC."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.lists import NEWER, NOWHERE, Queues, among, check_share
from moepolicy.policy import Context

NONE = -1


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


# ARC's lists: used once or again, in the cache or (ghosts) evicted from it.
ONCE, AGAIN, ONCE_GHOSTS, AGAIN_GHOSTS = 0, 1, 2, 3


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
