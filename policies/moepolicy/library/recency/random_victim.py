"""Evict any expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError


class Random(Policy):
    """Evict any expert, each with equal chance; ``seed`` makes it repeat."""

    always_evicts = True

    def __init__(self, context: Context, seed: int = 0) -> None:
        if seed < 0:
            raise PolicyUsageError(f"random: seed must be 0 or more, not {seed}")
        self.state = np.array([(seed * 16807 + 1043618065) % 2_147_483_646 + 1], np.int64)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """A candidate drawn by the seed."""
        # Park and Miller's generator: no product overflows int64, compiled or interpreted.
        self.state[0] = self.state[0] * 48271 % 2_147_483_647
        return int(candidates[self.state[0] % len(candidates)])
