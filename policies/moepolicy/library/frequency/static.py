"""Keep what a calibration trace used most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.selection import lowest
from moepolicy.policy import Context, Policy, PolicyError


class Static(Policy):
    """Keep the experts most used in a calibration trace; the others pass through staging."""

    requires = frozenset({"counts"})

    def __init__(self, context: Context) -> None:
        if context.counts is None:
            raise PolicyError("policy 'static' needs the expert counts of a calibration trace")
        self.uses = context.counts.astype(np.int64).ravel()

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate with the fewest counted uses; -1 if ``incoming`` has no more."""
        least = lowest(self.uses, candidates)
        # Strictly more: among equals the first that came stays, and nothing is exchanged in vain.
        return least if self.uses[incoming] > self.uses[least] else -1
