"""Eviction by how often and how lately experts were used, weighed against each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError, Same
from moepolicy.steps import Step


class LfuAging(Policy):
    """Evict the expert used least while cached, where what was evicted raises the newcomers' start.

    LFU with dynamic aging (Arlitt et al., "Evaluating Content Management Techniques for Web Proxy
    Caches", 2000): an expert's worth is its uses since its load plus the worth of the latest
    victim at that use. ``aging=0`` leaves the latter out: LFU that forgets what it evicts. Of
    equals the one that reached its worth first goes.
    """

    always_evicts = True

    def __init__(self, context: Context, aging: int = 1) -> None:
        if aging not in (0, 1):
            raise PolicyUsageError(f"lfu-aging: aging must be 0 or 1, not {aging}")
        n_domains = 1 if context.scope == "global" else context.n_layers
        self.width = context.n_keys // n_domains
        self.aging = aging
        self.uses = np.zeros(context.n_keys, np.int64)
        self.worth = np.zeros(context.n_keys, np.int64)
        self.used = np.zeros(context.n_keys, np.int64)
        self.age = np.zeros(n_domains, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Count the use."""
        self.count(key, 1, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count from 0 again, beginning with the use that the load is for; a guess is none."""
        self.uses[key] = 0
        self.count(key, 0 if speculative else 1, now)

    def count(self, key: int, uses: int, now: int) -> None:
        """Add ``uses`` to the count of ``key`` and renew its worth and its time of use."""
        self.uses[key] += uses
        self.worth[key] = self.uses[key] + self.age[key // self.width]
        self.used[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of least worth; of equals the one that reached it first."""
        least = first_of(self.worth, self.used, candidates)
        if self.aging:
            self.age[least // self.width] = self.worth[least]
        return least


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


class LeastStale(Policy):
    """Evict what this forward pass has not touched, the one loaded first (per layer: as fifo does).

    Least-Stale (SpecMD, arXiv 2602.03921). First loaded, first gone among the stale, so that a
    quiet pass does not cost an expert its slot as under LRU. A pass begins where the layers start
    over. What the pass has touched goes after all else. With a cache per layer it is FIFO: all
    that may go is stale there.
    """

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.loaded = np.zeros(context.n_keys, np.int64)
        self.touched = np.full(context.n_keys, -1, np.int64)  # the pass that touched it last
        self.passes = np.zeros(2, np.int64)  # the pass in progress, and its latest layer

    @classmethod
    def same_as(cls, context: Context) -> Same | None:
        """FIFO in a cache per layer."""
        if (same := super().same_as(context)) is None and context.scope == "layer":
            same = Same("fifo", "a pass comes to a layer once, and all that may go there is stale")
        return same

    def on_step(self, step: Step) -> None:
        """A new pass begins where the layers start over."""
        if step.layer <= self.passes[1]:
            self.passes[0] += 1
        self.passes[1] = step.layer

    def on_hit(self, key: int, now: int) -> None:
        """Note that this pass touched the key."""
        self.touched[key] = self.passes[0]

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that this pass touched the key, and the time of the load."""
        self.touched[key] = self.passes[0]
        self.loaded[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate loaded first of those that this pass has not touched, else of all."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            fresh = self.touched[key] == self.passes[0]
            best_fresh = self.touched[best] == self.passes[0]
            if fresh < best_fresh or (fresh == best_fresh and self.loaded[key] < self.loaded[best]):
                best = key
        return int(best)


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


def first_of(
    score: NDArray[np.int64], then: NDArray[np.int64], candidates: NDArray[np.int32]
) -> int:
    """The candidate with the smallest score; of equals, with the smallest of ``then``."""
    best = candidates[0]
    for i in range(1, len(candidates)):
        key = candidates[i]
        if score[key] < score[best] or (score[key] == score[best] and then[key] < then[best]):
            best = key
    return int(best)
