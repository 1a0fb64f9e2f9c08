"""When each expert of a recorded trace is used next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import NO_USE, Context, PolicyError

BLOCK = 1 << 20  # steps or demands looked at together


def next_use(keys: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The step that next uses each demanded key; ``NO_USE`` where none does.

    ``keys[offsets[s]:offsets[s + 1]]`` is step ``s``'s demand, each key once.
    """
    following = np.full(len(keys), NO_USE, np.int64)
    for block, found in next_use_blocks(keys, offsets):
        following[block] = found
    return following


def next_use_blocks(
    keys: NDArray[np.int32], offsets: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """The next uses of `next_use`, a stretch of ``keys`` at a time, the last stretch first."""
    later = np.full(int(keys.max(initial=-1)) + 1, NO_USE, np.int64)
    # From the end, a block at a time: sorting all of a long trace at once takes its memory
    # several times over.
    for last in range(len(offsets) - 1, 0, -BLOCK):
        first = max(0, last - BLOCK)
        block = slice(offsets[first], offsets[last])
        demanded = keys[block]
        steps = np.repeat(np.arange(first, last), np.diff(offsets[first : last + 1]))
        order = np.lexsort((steps, demanded))
        same = demanded[order[1:]] == demanded[order[:-1]]
        found = later[demanded]
        found[order[:-1][same]] = steps[order[1:][same]]
        yield block, found
        firsts = order[np.append(True, ~same)] if len(order) else order
        later[demanded[firsts]] = steps[firsts]


def first_use(
    demands: NDArray[np.int32], offsets: NDArray[np.int64], n_keys: int
) -> NDArray[np.int64]:
    """int64[n_keys]: the step that first uses each key; ``NO_USE`` where none does."""
    first = np.full(n_keys, NO_USE, np.int64)
    for start in range(0, len(demands), BLOCK):
        keys, at = np.unique(demands[start : start + BLOCK], return_index=True)
        steps = np.searchsorted(offsets, start + at, side="right") - 1
        first[keys] = np.minimum(first[keys], steps)
        if not np.any(first == NO_USE):
            break
    return first


def future_of(context: Context, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The trace's next uses and offsets. PolicyError where there is no trace."""
    if context.next_use is None or context.offsets is None:
        raise PolicyError(
            f"policy '{name}' needs the future of a recorded trace: it runs in moesim, not live"
        )
    return context.next_use, context.offsets
