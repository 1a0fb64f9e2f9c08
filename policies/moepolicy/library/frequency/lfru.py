"""Uses weighed by the time since the last one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy
from moepolicy.steps import Step


class Lfru(Policy):
    """Evict the expert with the fewest uses for the time since its last one.

    Uses since the start, resident or not, over the steps since the last: a rate like that of
    Hyperbolic caching (Blankstein, Sen and Freedman, USENIX ATC 2017).
    """

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.uses = np.zeros(context.n_keys, np.int64)
        self.used = np.zeros(context.n_keys, np.int64)  # step of its last use or load
        self.now = np.zeros(1, np.int64)

    def on_step(self, step: Step) -> None:
        """Note the step's number, the time that rates are by."""
        self.now[0] = step.number

    def on_hit(self, key: int, now: int) -> None:
        """Count the use and note its step."""
        self.uses[key] += 1
        self.used[key] = self.now[0]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the step, and count the use that the load is for; a guess is none."""
        if not speculative:
            self.uses[key] += 1
        self.used[key] = self.now[0]

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate with the lowest rate of uses; of equals the lowest key."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            # Rates compared without dividing: exact, compiled or not.
            age, least_age = self.now[0] + 1 - self.used[key], self.now[0] + 1 - self.used[best]
            if self.uses[key] * least_age < self.uses[best] * age:
                best = key
        return int(best)
