"""The kernel that counts kinds of step (`moesim.engines.onepass`) from a replay's events."""

from __future__ import annotations

import numpy as np
from moepolicy.kinds import BYPASS, EVICT, LOAD
from numpy.typing import NDArray

from moesim.engines.step_kinds import BYPASSED, INTO_EMPTIED, INTO_FREE
from moesim.jit import jit


@jit
def count_kinds(
    events: NDArray[np.int32],
    first: int,
    keys: NDArray[np.int32],
    top_k: int,
    begins_pass: NDArray[np.bool_],
    table: NDArray[np.int64],
) -> None:
    """Add to ``table``, by kind, the steps from ``first`` on that ``begins_pass`` is of.

    ``events`` [n, 4] are theirs. How a key came is what it is told by first: a victim that went
    for it, a bypass, or a copy that needed neither.
    """
    kinds = np.zeros(len(begins_pass), np.int64)
    for i in range(len(events)):
        kind, step = events[i, 0], events[i, 1] - first
        if kind == LOAD:
            key, came = events[i, 2], INTO_FREE
        elif kind == EVICT:
            key, came = events[i, 3], INTO_EMPTIED
        elif kind == BYPASS:
            key, came = events[i, 2], BYPASSED
        else:
            continue
        at = (step + first) * top_k
        for rank in range(top_k):
            if keys[at + rank] == key:
                if (kinds[step] >> (1 + 2 * rank)) & 3 == 0:
                    kinds[step] |= came << (1 + 2 * rank)
                break
    for step in range(len(begins_pass)):
        table[kinds[step] | begins_pass[step]] += 1
