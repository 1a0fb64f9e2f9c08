"""Belady over whole steps: the fewest loads, of a whole trace or of each of its windows.

A domain's cache is a heap by next use with the place of each key in it, so that a step costs the
logarithm of the cache, and memory does not grow with the trace.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import jit

# Columns of what window_loads counts.
LOADS = 0  # from an empty cache
FILLS = 1  # of these, into slots that were still free


@jit
def window_loads(
    keys: NDArray[np.int32],
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    domain_of: NDArray[np.int32],
    n_domains: int,
    capacity: int,
    n_keys: int,
    window: int,
    bypass: bool,
) -> NDArray[np.int64]:
    """int64[windows, 2]: loads and fills of each ``window`` steps, every cache empty before it.

    The difference is the fewest loads from the best content the cache could have begun with:
    the keys used first, which are those that fill it.
    """
    n_steps = len(offsets) - 1
    counts = np.zeros(((n_steps + window - 1) // window, 2), np.int64)
    widest = 0
    for step in range(n_steps):
        widest = max(widest, offsets[step + 1] - offsets[step])
    heap = np.zeros((n_domains, min(capacity, n_keys) + widest), np.int32)
    size = np.zeros(n_domains, np.int64)
    place = np.full(n_keys, -1, np.int32)
    due = np.zeros(n_keys, np.int64)
    for step in range(n_steps):
        domain = domain_of[step]
        row = heap[domain]
        first, last = offsets[step], offsets[step + 1]
        n, missing = _admit(
            row, size[domain], place, due, keys, next_use, first, last, capacity, bypass
        )
        counts[step // window, LOADS] += missing
        size[domain] = n
        if (step + 1) % window == 0 or step + 1 == n_steps:
            for d in range(n_domains):
                counts[step // window, FILLS] += size[d]
                for i in range(size[d]):
                    place[heap[d, i]] = -1
                size[d] = 0
    return counts


@jit
def _admit(
    heap: NDArray[np.int32],
    n: int,
    place: NDArray[np.int32],
    due: NDArray[np.int64],
    keys: NDArray[np.int32],
    next_use: NDArray[np.int64],
    first: int,
    last: int,
    capacity: int,
    bypass: bool,
) -> tuple[int, int]:
    """Serve one step's demand; returns the experts cached after it and how many it missed.

    With bypass, of cache and demand those used soonest stay. Without, the demand stays as far as
    it fits, and of a demand wider than the cache those of it that are used soonest.
    """
    missing = 0
    for i in range(first, last):
        key = keys[i]
        if place[key] < 0:
            missing += 1
            place[key] = n
            heap[n] = key
            n += 1
            due[key] = -1
        elif not bypass:
            due[key] = -1  # before all that waits: what leaves is not of this step
            _down(heap, n, place, due, place[key])
    if not bypass:
        n = _shrink(heap, n, place, due, max(capacity, last - first))
    for i in range(first, last):
        due[keys[i]] = next_use[i]
        _up(heap, place, due, place[keys[i]])
    return _shrink(heap, n, place, due, capacity), missing


@jit
def _shrink(
    heap: NDArray[np.int32], n: int, place: NDArray[np.int32], due: NDArray[np.int64], capacity: int
) -> int:
    """Evict the farthest next use until ``capacity`` are left; returns how many are."""
    while n > capacity:
        n -= 1
        place[heap[0]] = -1
        if n:
            heap[0] = heap[n]
            _down(heap, n, place, due, 0)
    return n


@jit
def _up(heap: NDArray[np.int32], place: NDArray[np.int32], due: NDArray[np.int64], i: int) -> None:
    key = heap[i]
    while i > 0:
        above = (i - 1) >> 1
        if due[heap[above]] >= due[key]:
            break
        heap[i] = heap[above]
        place[heap[i]] = i
        i = above
    heap[i] = key
    place[key] = i


@jit
def _down(
    heap: NDArray[np.int32], n: int, place: NDArray[np.int32], due: NDArray[np.int64], i: int
) -> None:
    key = heap[i]
    while 2 * i + 1 < n:
        below = 2 * i + 1
        if below + 1 < n and due[heap[below + 1]] > due[heap[below]]:
            below += 1
        if due[heap[below]] <= due[key]:
            break
        heap[i] = heap[below]
        place[heap[i]] = i
        i = below
    heap[i] = key
    place[key] = i
