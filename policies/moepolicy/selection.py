"""Small pieces policies are made of; plain loops, so that numba compiles them with the policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lowest(score: NDArray[np.int64], candidates: NDArray[np.int32]) -> int:
    """The candidate with the smallest score; equal scores: the lowest key."""
    best = candidates[0]
    for i in range(1, len(candidates)):
        if score[candidates[i]] < score[best]:
            best = candidates[i]
    return int(best)


def highest(score: NDArray[np.int64], candidates: NDArray[np.int32]) -> int:
    """The candidate with the greatest score; equal scores: the lowest key."""
    best = candidates[0]
    for i in range(1, len(candidates)):
        if score[candidates[i]] > score[best]:
            best = candidates[i]
    return int(best)


def top_n(logits: NDArray[np.float32], n: int) -> NDArray[np.int32]:
    """The ``n`` experts with the greatest logits, best first; equal logits: the lowest expert."""
    n = min(n, len(logits))
    chosen = np.empty(n, np.int32)
    taken = np.zeros(len(logits), np.bool_)
    for i in range(n):
        best = -1
        for e in range(len(logits)):
            if not taken[e] and (best < 0 or logits[e] > logits[best]):
                best = e
        taken[best] = True
        chosen[i] = best
    return chosen
