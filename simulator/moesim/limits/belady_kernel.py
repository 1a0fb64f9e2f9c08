"""Belady over whole steps: the fewest loads, of a whole trace or of each of its windows.

What a clairvoyant cache holds matters only as the steps at which its experts are used next: a
step's hits are those that are due at it, and what goes is due last. So a domain's cache is a
heap of steps, with the number of experts that are due at each step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from moepolicy import NO_USE
from numpy.typing import NDArray

from moesim.jit import jit

# What window_loads counts.
LOADS = 0  # from an empty cache
FILLS = 1  # of these, into slots that were still free


class Caches(NamedTuple):
    """Clairvoyant caches between two steps."""

    heap: NDArray[np.int64]  # [caches, room] the steps at which what they hold is due
    size: NDArray[np.int64]  # [caches] of the heap, those that are past included
    held: NDArray[np.int64]  # [caches] of the heap, those still to come
    filled: NDArray[np.int64]  # [caches] slots that were used so far
    due: NDArray[np.int16]  # [steps] experts held that are due at it
    loads: NDArray[np.int64]  # [1] so far


def new_caches(capacity: NDArray[np.int64], widest: int, n_steps: int) -> Caches:
    """Empty ones, of ``capacity`` slots each, for steps of at most ``widest`` experts."""
    n = len(capacity)
    # Room for as many uses that are past as are to come: then those are swept out.
    heap = np.zeros((n, 2 * (int(capacity.max()) + widest)), np.int64)
    size, held, filled = (np.zeros(n, np.int64) for _ in range(3))
    return Caches(heap, size, held, filled, np.zeros(n_steps, np.int16), np.zeros(1, np.int64))


@jit
def window_loads(
    counts: NDArray[np.int64],
    starts: tuple[int, int],
    steps: tuple[int, int],
    caches: Caches,
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    domain_of: NDArray[np.int32],
    capacity: NDArray[np.int64],
    stride: int,
    bypass: bool,
) -> None:
    """Fill ``counts`` [starts, count, 2] with loads and fills of the windows of 1, 2, ... count
    strides.

    ``domain_of`` [steps] is the cache that a step uses; cache d has ``capacity[d]`` slots. A window
    starts at every ``stride`` steps, with every cache empty; it ends with the trace.
    Loads less fills are the fewest loads from the best content the caches could have begun with:
    the experts used first, which are those that fill it.

    Only the windows from first to one before last of ``starts`` are looked at, and only the first
    to one before last of ``steps``. ``caches`` are empty before the steps of a window and after
    them; of a window that is looked at a stretch of steps at a time, they go from call to call.
    """
    n_steps, count = len(offsets) - 1, counts.shape[1]
    for start in range(starts[0], starts[1]):
        for i in range(count):
            first = min((start + i) * stride, n_steps)
            last = min(first + stride, n_steps)
            for step in range(max(first, steps[0]), min(last, steps[1])):
                _serve(caches, step, next_use, offsets, domain_of[step], capacity, bypass)
            if steps[0] < last <= steps[1]:
                counts[start, i, LOADS] = caches.loads[0]
                counts[start, i, FILLS] = caches.filled.sum()
        if steps[1] >= min((start + count) * stride, n_steps):
            _empty(caches)


@jit
def _serve(
    caches: Caches,
    step: int,
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    d: int,
    capacity: NDArray[np.int64],
    bypass: bool,
) -> None:
    """Let cache ``d`` serve a step."""
    heap, size, held, filled, due, loads = caches
    width = offsets[step + 1] - offsets[step]
    missing = width - due[step]
    held[d] -= due[step]
    due[step] = 0
    loads[0] += missing
    filled[d] = min(capacity[d], filled[d] + missing)
    if not bypass:
        size[d], held[d] = _shrink(heap[d], size[d], held[d], due, max(capacity[d] - width, 0))
    if size[d] + width > heap.shape[1]:
        size[d] = _sweep(heap[d], size[d], step)
    for j in range(offsets[step], offsets[step + 1]):
        if next_use[j] != NO_USE:
            due[next_use[j]] += 1
            _push(heap[d], size[d], next_use[j])
            size[d] += 1
            held[d] += 1
    size[d], held[d] = _shrink(heap[d], size[d], held[d], due, capacity[d])


@jit
def _empty(caches: Caches) -> None:
    heap, size, held, filled, due, loads = caches
    for d in range(len(size)):
        for i in range(size[d]):
            due[heap[d, i]] = 0
        size[d] = held[d] = filled[d] = 0
    loads[0] = 0


@jit
def _shrink(
    heap: NDArray[np.int64], size: int, held: int, due: NDArray[np.int16], capacity: int
) -> tuple[int, int]:
    """Evict what is due last until ``capacity`` are held."""
    while held > capacity:
        due[heap[0]] -= 1
        held -= 1
        size -= 1
        _sink(heap, size, heap[size])
    return size, held


@jit
def _sweep(heap: NDArray[np.int64], size: int, step: int) -> int:
    """Take out of the heap what was due up to ``step``."""
    n = 0
    for i in range(size):
        use = heap[i]
        if use > step:
            _push(heap, n, use)
            n += 1
    return n


@jit
def _push(heap: NDArray[np.int64], size: int, use: int) -> None:
    i = size
    while i > 0:
        above = (i - 1) >> 1
        if heap[above] >= use:
            break
        heap[i] = heap[above]
        i = above
    heap[i] = use


@jit
def _sink(heap: NDArray[np.int64], size: int, use: int) -> None:
    """Put ``use`` in the place of the top of a heap of ``size``."""
    i = 0
    while 2 * i + 1 < size:
        below = 2 * i + 1
        if below + 1 < size and heap[below + 1] > heap[below]:
            below += 1
        if heap[below] <= use:
            break
        heap[i] = heap[below]
        i = below
    heap[i] = use


@jit
def longest_path(
    single: NDArray[np.int64],
    bounds: NDArray[np.int64],
    strides: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> int:
    """The greatest sum of windows that follow each other from the first unit to the last.

    ``single`` [units] is for one unit; then for every stride, one after the other, ``bounds``
    holds [starts, count] windows of 1, 2, ... strides from each multiple of it.
    """
    n = len(single)
    best = np.zeros(n + 1, np.int64)
    for unit in range(n):
        best[unit + 1] = max(best[unit + 1], best[unit] + single[unit])
        base = 0
        for scale in range(len(strides)):
            stride, count = strides[scale], counts[scale]
            if unit % stride == 0:
                row = base + unit // stride * count
                for i in range(count):
                    end = min(unit + (i + 1) * stride, n)
                    best[end] = max(best[end], best[unit] + bounds[row + i])
            base += (n + stride - 1) // stride * count
    return int(best[n])
