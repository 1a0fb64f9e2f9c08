"""A split of the misses between link and CPU, by their bandwidths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.library.selection import lowest
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

UNIT = 1 << 16  # one load, in fixed point: compiled and interpreted code then agree exactly


class Split(Policy):
    """LRU that loads ``share`` of the missing experts, and computes the others on the CPU.

    A miss can be copied over the link, or read where it is by the CPU: both wait for memory, so
    the best share of the link is its bandwidth over the sum of both. FreeToken's hybrid mode
    splits so, and fetches 0.5 by default (``docs/design-vram-hot-expert-pin.md`` there). The
    heaviest of a step's misses are loaded. What a step's share has beyond whole experts is carried
    on to the next step, so that 0.5 loads every second of single misses.
    """

    requires = frozenset({"cpu"})
    always_evicts = True

    def __init__(self, context: Context, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise PolicyUsageError(f"split: share must be from 0 to 1, not {share}")
        self.share = round(share * UNIT)
        self.used = np.zeros(context.n_keys, np.int64)
        self.held = np.zeros(context.n_keys, np.bool_)
        self.credit = np.zeros(2, np.int64)  # loads to come: in UNITs carried on; of this step

    def on_step(self, step: Step) -> None:
        """Work out how many of the step's misses to load."""
        for rank in range(len(step.experts)):
            if not self.held[step.experts[rank]]:
                self.credit[0] += self.share
        self.credit[1] = self.credit[0] // UNIT
        self.credit[0] %= UNIT

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, and that the key is on the device."""
        self.used[key] = now
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD the first misses, as many as the share has room for; COMPUTE the others."""
        if self.credit[1] < 1:
            return COMPUTE
        self.credit[1] -= 1
        return LOAD

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose last use is longest ago."""
        return lowest(self.used, candidates)
