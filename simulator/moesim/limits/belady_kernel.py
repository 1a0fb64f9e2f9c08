"""Belady over whole steps: the fewest loads, of a whole trace or of each of its windows.

What a clairvoyant cache holds matters only as the steps at which its experts are used next: a
step's hits are those that are due at it, and what goes is due last. So a domain's cache is a
heap of steps, with the number of experts that are due at each step.
"""

from __future__ import annotations

import numpy as np
from moepolicy import NO_USE
from numpy.typing import NDArray

from moesim.jit import jit

# What window_loads counts.
LOADS = 0  # from an empty cache
FILLS = 1  # of these, into slots that were still free


@jit
def window_loads(
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    domain_of: NDArray[np.int32],
    n_domains: int,
    capacity: int,
    stride: int,
    count: int,
    bypass: bool,
) -> NDArray[np.int64]:
    """int64[starts, count, 2]: loads and fills of the windows of 1, 2, ... ``count`` strides.

    A window starts at every ``stride`` steps, with every cache empty; it ends with the trace.
    Loads less fills are the fewest loads from the best content the caches could have begun with:
    the experts used first, which are those that fill it.
    """
    n_steps = len(offsets) - 1
    n_starts = (n_steps + stride - 1) // stride
    counts = np.zeros((n_starts, count, 2), np.int64)
    widest = 0
    for step in range(n_steps):
        widest = max(widest, offsets[step + 1] - offsets[step])
    # Room for as many uses that are past as are to come: then those are swept out.
    heap = np.zeros((n_domains, 2 * (capacity + widest)), np.int64)
    size = np.zeros(n_domains, np.int64)
    held = np.zeros(n_domains, np.int64)  # of the heap, those still to come
    filled = np.zeros(n_domains, np.int64)
    due = np.zeros(n_steps, np.int16)
    for start in range(n_starts):
        loads = 0
        for i in range(count):
            first = min((start + i) * stride, n_steps)
            for step in range(first, min(first + stride, n_steps)):
                d = domain_of[step]
                width = offsets[step + 1] - offsets[step]
                missing = width - due[step]
                held[d] -= due[step]
                due[step] = 0
                loads += missing
                filled[d] = min(capacity, filled[d] + missing)
                if not bypass:
                    size[d], held[d] = _shrink(
                        heap[d], size[d], held[d], due, max(capacity - width, 0)
                    )
                if size[d] + width > heap.shape[1]:
                    size[d] = _sweep(heap[d], size[d], step)
                for j in range(offsets[step], offsets[step + 1]):
                    if next_use[j] != NO_USE:
                        due[next_use[j]] += 1
                        _push(heap[d], size[d], next_use[j])
                        size[d] += 1
                        held[d] += 1
                size[d], held[d] = _shrink(heap[d], size[d], held[d], due, capacity)
            counts[start, i, LOADS] = loads
            counts[start, i, FILLS] = filled.sum()
        for d in range(n_domains):
            for i in range(size[d]):
                due[heap[d, i]] = 0
            size[d] = held[d] = filled[d] = 0
    return counts


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
