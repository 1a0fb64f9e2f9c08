"""One pass over a trace for every cache size: what each size holds is in what a larger one holds.

So a domain is one stack of keys: a cache of C slots holds its C topmost, and a request at place p
is a hit for every C above p. That holds for whole steps, with pins and in router order, because
who leaves is decided by a priority that is the same at every size, and because what a step wider
than the cache leaves behind is nested too: its hits, then its misses in router order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import jit

LRU = 0
LFU = 1
BELADY = 2
BELADY_BYPASS = 3


class Stacks(NamedTuple):
    """What lasts from step to step: the stacks, and what is known of each key."""

    stack: NDArray[np.int32]  # [n_domains, n_keys] a domain's keys, the topmost first
    depth: NDArray[np.int64]  # [n_domains]
    place: NDArray[np.int32]  # [n_keys] in its stack; -1: it is in none
    priority: NDArray[np.int64]  # [n_keys]
    wanted: NDArray[np.bool_]  # [n_keys] by the step in progress
    hits: NDArray[np.int64]  # [n_keys + 1] requests that a cache of so many is the first to serve


def new_stacks(n_domains: int, n_keys: int) -> Stacks:
    """Empty caches."""
    return Stacks(
        stack=np.zeros((n_domains, n_keys), np.int32),
        depth=np.zeros(n_domains, np.int64),
        place=np.full(n_keys, -1, np.int32),
        priority=np.zeros(n_keys, np.int64),
        wanted=np.zeros(n_keys, np.bool_),
        hits=np.zeros(n_keys + 1, np.int64),
    )


def hits_by_size(stacks: Stacks) -> NDArray[np.int64]:
    """int64[n_keys + 1]: the hits of a cache of 0, 1, ... experts in each domain, summed."""
    return np.cumsum(stacks.hits)


@jit
def count_hits(
    stacks: Stacks,
    keys: NDArray[np.int32],
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    domain_of: NDArray[np.int32],
    first: int,
    last: int,
    policy: int,
) -> None:
    """Have the caches serve steps ``first`` to ``last`` - 1 of the trace."""
    stack, depth, place, priority, wanted, hits = stacks
    n_steps = len(offsets) - 1
    n_keys = len(place)
    carried = np.zeros(n_keys, np.int32)
    renewed = np.zeros(n_keys, np.int32)
    for step in range(first, last):
        d = domain_of[step]
        demand = keys[offsets[step] : offsets[step + 1]]
        for rank in range(len(demand)):
            key = demand[rank]
            wanted[key] = True
            if place[key] >= 0:
                hits[place[key] + 1] += 1
            if policy == LRU:
                priority[key] = (step + 1) * (n_keys + 1) - rank
            elif policy == LFU:
                priority[key] += n_keys
            else:
                due = min(next_use[offsets[step] + rank], n_steps)
                priority[key] = (n_steps - due) * n_keys
        pinned = policy != BELADY_BYPASS
        n = _restack(stack[d], depth[d], demand, wanted, priority, pinned, carried, renewed)
        for i in range(n):
            stack[d, i] = renewed[i]
            place[renewed[i]] = i
        depth[d] = max(depth[d], n)
        for rank in range(len(demand)):
            wanted[demand[rank]] = False


@jit
def _restack(
    stack: NDArray[np.int32],
    depth: int,
    demand: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    priority: NDArray[np.int64],
    pinned: bool,
    carried: NDArray[np.int32],
    renewed: NDArray[np.int32],
) -> int:
    """Write the top of the stack after a step into ``renewed``; what lies below stays. Returns
    how much was written.

    Growing the cache by a slot, it keeps the best of what the smaller one let go (``carried``,
    best last) and of the key that the slot held before. A pinned demand is kept before all.
    """
    n, n_carried = 0, 0
    if pinned:
        n, n_carried = _pin(stack, depth, demand, wanted, priority, carried, renewed)
    else:
        for rank in range(len(demand)):
            n_carried = _carry(carried, n_carried, demand[rank], priority)
    while n_carried:
        key = stack[n] if n < depth else -1
        if key >= 0 and not wanted[key]:
            n_carried = _carry(carried, n_carried, key, priority)
        n_carried -= 1
        renewed[n] = carried[n_carried]
        n += 1
    return n


@jit
def _pin(
    stack: NDArray[np.int32],
    depth: int,
    demand: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    priority: NDArray[np.int64],
    carried: NDArray[np.int32],
    renewed: NDArray[np.int32],
) -> tuple[int, int]:
    """Put the demand on top; returns how many there are, and how many were displaced by it.

    A cache too small for all of it keeps its hits, then misses in router order.
    """
    n_carried, upcoming = 0, 0
    n = len(demand)
    for i in range(n):
        key = stack[i] if i < depth else -1
        if key >= 0 and not wanted[key]:
            n_carried = _carry(carried, n_carried, key, priority)
        if key < 0 or not wanted[key] or _among(renewed, i, key):
            while _among(renewed, i, demand[upcoming]):
                upcoming += 1
            key = demand[upcoming]
        renewed[i] = key
    return n, n_carried


@jit
def _among(keys: NDArray[np.int32], n: int, key: int) -> bool:
    for i in range(n):  # noqa: SIM110  numba has no any() of a generator
        if keys[i] == key:
            return True
    return False


@jit
def _carry(carried: NDArray[np.int32], n: int, key: int, priority: NDArray[np.int64]) -> int:
    """Add ``key`` to those carried, which ascend by priority; of equals the higher key is last."""
    i = n
    while i > 0 and (
        priority[carried[i - 1]] > priority[key]
        or (priority[carried[i - 1]] == priority[key] and carried[i - 1] > key)
    ):
        carried[i] = carried[i - 1]
        i -= 1
    carried[i] = key
    return n + 1
