"""CoServe: evict by how probable a use is, as counted beforehand."""

from __future__ import annotations

import numpy as np

from moepolicy.policy import Context, PolicyError
from moepolicy.scores import ByScore


class CoServe(ByScore):
    """Evict the expert least used in a calibration trace (CoServe, 2503.02354).

    Every missing expert is kept, unlike under ``static``. Of the paper's system only this: the
    order in which it serves requests has no counterpart where one model serves one sequence.
    """

    requires = frozenset({"counts"})

    def __init__(self, context: Context) -> None:
        if context.counts is None:
            raise PolicyError("policy 'coserve' needs the expert counts of a calibration trace")
        self.eviction_score = context.counts.astype(np.int64).ravel()
