"""LRU within classes of decayed counts of uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

ONE = 1 << 16  # a use, in fixed point: compiled and interpreted code then agree exactly

SHIFT = 30


class ClassLru(Policy):
    """Evict the least recent of the lowest class: classes double in uses, and uses decay.

    An expert's class is floor(log2) of its count of uses, each worth half after ``half_life``
    forward passes: the frequency classes of Robinson and Devarakonda (SIGMETRICS 1990) with
    exponential decay in place of their periodic halving.
    """

    always_evicts = True

    def __init__(self, context: Context, half_life: int = 128) -> None:
        if half_life < 1:
            raise PolicyUsageError(f"class-lru: half_life must be 1 or more, not {half_life}")
        self.half_life = half_life
        self.share = (2.0 ** (SHIFT - np.arange(half_life) / half_life)).astype(np.int64)
        self.count = np.zeros(context.n_keys, np.int64)
        self.counted = np.zeros(context.n_keys, np.int64)  # the pass that the count is of
        self.used = np.zeros(context.n_keys, np.int64)
        self.passes = np.zeros(2, np.int64)  # the pass in progress, and its latest layer

    def on_step(self, step: Step) -> None:
        """A new pass begins where the layers start over."""
        if step.layer <= self.passes[1]:
            self.passes[0] += 1
        self.passes[1] = step.layer

    def on_hit(self, key: int, now: int) -> None:
        """Count the use."""
        self.use(key, ONE, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count the use that the load is for; a guess is none."""
        self.use(key, 0 if speculative else ONE, now)

    def use(self, key: int, worth: int, now: int) -> None:
        """Add ``worth``, ONE for a use, to the decayed count of ``key`` at time ``now``."""
        self.count[key] = self.decayed(key) + worth
        self.counted[key] = self.passes[0]
        self.used[key] = now

    def decayed(self, key: int) -> int:
        """The count of ``key`` as of this pass."""
        age = self.passes[0] - self.counted[key]
        count = self.count[key] * self.share[age % self.half_life] >> SHIFT
        return int(count >> min(age // self.half_life, 62))

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The least recently used candidate of the lowest class."""
        best, lowest_class = -1, 64
        for i in range(len(candidates)):
            key = candidates[i]
            its_class = n_bits(self.decayed(key))
            if its_class < lowest_class or (
                its_class == lowest_class and self.used[key] < self.used[best]
            ):
                best, lowest_class = int(key), its_class
        return best


def n_bits(count: int) -> int:
    """1 + floor(log2(count)); 0 of 0."""
    n = 0
    while count > 0:
        count >>= 1
        n += 1
    return n
