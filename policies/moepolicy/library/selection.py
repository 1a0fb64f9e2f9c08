"""Small pieces policies are made of; plain loops, so that numba compiles them with the policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def lowest(score: NDArray[Any], candidates: NDArray[np.int32]) -> int:
    """The candidate with the smallest score; equal scores: the lowest key."""
    least = score[candidates[0]]
    for i in range(1, len(candidates)):
        least = min(least, score[candidates[i]])
    return _first_with(score, least, candidates)


def highest(score: NDArray[Any], candidates: NDArray[np.int32]) -> int:
    """The candidate with the greatest score; equal scores: the lowest key."""
    most = score[candidates[0]]
    for i in range(1, len(candidates)):
        most = max(most, score[candidates[i]])
    return _first_with(score, most, candidates)


def _first_with(score: NDArray[Any], wanted: Any, candidates: NDArray[np.int32]) -> int:
    # A pass of its own: finding the extreme then takes no branch that depends on the data.
    i = 0
    while score[candidates[i]] != wanted:
        i += 1
    return int(candidates[i])


def top_n(logits: NDArray[Any], n: int, first_key: int, keys: NDArray[np.int32]) -> int:
    """Write the keys of the ``n`` greatest logits into ``keys``, best first; returns how many.

    The logits are those of keys ``first_key`` and following; equal logits: the lowest key.
    """
    n = min(n, len(logits))
    last = -1
    for i in range(n):
        best = -1
        for e in range(len(logits)):
            # Behind the one chosen last: a smaller logit, or an equal one at a higher key.
            behind = (
                last < 0 or logits[e] < logits[last] or (logits[e] == logits[last] and e > last)
            )
            if behind and (best < 0 or logits[e] > logits[best]):
                best = e
        keys[i] = first_key + best
        last = best
    return n


def marked(marks: NDArray[np.bool_], first: int, n: int, keys: NDArray[np.int32]) -> int:
    """Write those of the ``n`` keys from ``first`` on that are marked into ``keys``, ascending;
    returns how many."""
    found = 0
    for key in range(first, first + n):
        if marks[key]:
            keys[found] = key
            found += 1
    return found
