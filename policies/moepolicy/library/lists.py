"""Keys in ordered lists, held in arrays: what policies made of queues share.

Each domain (a layer's cache, or the one of all layers) has the same few lists. A list may hold
keys that are not in the cache: a ghost list remembers what was evicted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError

OLDER = 0
NEWER = 1
NOWHERE = -1


class Queues(Policy):
    """The part of a policy that is lists of keys, oldest to newest by ``stamp``.

    A key is in one list at most. Pins are no concern of the lists: ``oldest_of`` passes over
    what is not among the candidates, and leaves it where it is. A prefetched expert is
    ``guessed`` until its first use, so that this does not count as a second one.
    """

    always_evicts = True

    def __init__(self, context: Context, n_lists: int) -> None:
        shared = context.scope == "global"
        n_domains = 1 if shared else context.n_layers
        self.n_keys = context.n_keys
        # Slots of a domain.
        self.capacity = min(context.slots, context.n_experts) * context.n_layers // n_domains
        n_heads = n_domains * n_lists
        # A list is a ring through its head, one of the nodes after the keys. The heads of a
        # domain's lists follow one another; the first is looked up, as dividing takes longer.
        domains = np.arange(self.n_keys) * n_domains // self.n_keys
        self.first_head = self.n_keys + domains * n_lists
        self.links = np.repeat(np.arange(self.n_keys + n_heads), 2).reshape(-1, 2)
        self.stamp = np.zeros(self.n_keys, np.int64)
        self.at = np.full(self.n_keys, NOWHERE, np.int64)  # the head of the key's list
        self.length = np.zeros(self.n_keys + n_heads, np.int64)  # of each head's list
        self.guessed = np.zeros(self.n_keys, np.bool_)

    def head(self, key: int, which: int) -> int:
        """The head of list ``which`` of the domain of ``key``."""
        return int(self.first_head[key]) + which

    def enter(self, key: int, head: int, now: int) -> None:
        """Put ``key`` among the newest of a list; within a step the heaviest ends as the newest."""
        before = self.links[head, OLDER]
        while before != head and self.stamp[before] > now:
            before = self.links[before, OLDER]
        self.stamp[key] = now
        link(self.links, key, before)
        self.at[key] = head
        self.length[head] += 1

    def append(self, key: int, head: int) -> None:
        """Put ``key`` at the newest end of a list, whenever it was used."""
        newest = self.links[head, OLDER]
        self.stamp[key] = self.stamp[newest] if newest != head else 0
        link(self.links, key, newest)
        self.at[key] = head
        self.length[head] += 1

    def leave(self, key: int) -> None:
        """Take ``key`` out of its list."""
        unlink(self.links, key)
        self.length[self.at[key]] -= 1
        self.at[key] = NOWHERE

    def trim(self, head: int, most: int) -> None:
        """Forget the oldest of a list until there are no more than ``most``."""
        while self.length[head] > most:
            self.leave(self.links[head, NEWER])

    def all_may_go(self, key: int, lists: int, candidates: NDArray[np.int32]) -> bool:
        """Whether ``candidates`` are all that the first ``lists`` lists of a domain hold, as is
        usual: none of it pinned, staged or on its way. Then none has to be looked up."""
        n = 0
        for which in range(lists):
            n += self.length[self.head(key, which)]
        return bool(n == len(candidates))

    def oldest_of(self, head: int, every: bool, candidates: NDArray[np.int32]) -> int:
        """The oldest of a list that is among ``candidates`` (``every`` one is); -1 if none is."""
        key = self.links[head, NEWER]
        while key != head:
            if every or among(candidates, key):
                return int(key)
            key = self.links[key, NEWER]
        return -1


def link(links: NDArray[np.int64], node: int, before: int) -> None:
    """Insert ``node`` into a ring right after ``before``."""
    after = links[before, NEWER]
    links[node, OLDER] = before
    links[node, NEWER] = after
    links[before, NEWER] = node
    links[after, OLDER] = node


def unlink(links: NDArray[np.int64], node: int) -> None:
    """Take ``node`` out of its ring."""
    older, newer = links[node, OLDER], links[node, NEWER]
    links[older, NEWER] = newer
    links[newer, OLDER] = older


def among(candidates: NDArray[np.int32], key: int) -> bool:
    """Whether ``key`` is one of ``candidates``, which ascend."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if candidates[middle] < key:
            low = middle + 1
        else:
            high = middle
    return bool(low < len(candidates) and candidates[low] == key)


def check_share(policy: str, name: str, share: float) -> None:
    """PolicyError unless ``share`` is a share of the cache."""
    if not 0 <= share <= 1:
        raise PolicyUsageError(f"{policy}: {name} must be a share from 0 to 1, not {share}")
