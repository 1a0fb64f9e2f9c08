"""Eviction from what has been seen so far: LRU, LFU, FIFO, random, static top-N."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.policy import Context, Policy, PolicyError, PolicyUsageError
from moepolicy.selection import lowest
from moepolicy.steps import Step


class Lru(Policy):
    """Evict the least recently used expert (the cache of arXiv 2312.17238)."""

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.used = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, a guess or not, as a use."""
        self.used[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose last use is longest ago."""
        return lowest(self.used, candidates)


class Fifo(Policy):
    """Evict the expert that was loaded first."""

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.loaded = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load."""
        self.loaded[key] = now

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose load is longest ago."""
        return lowest(self.loaded, candidates)


class Lfu(Policy):
    """Evict the expert used least often since the start, resident or not (perfect LFU)."""

    always_evicts = True

    def __init__(self, context: Context) -> None:
        self.uses = np.zeros(context.n_layers * context.n_experts, np.int64)

    def on_hit(self, key: int, now: int) -> None:
        """Count the use."""
        self.uses[key] += 1

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count the use that the load is for; a guess is none."""
        if not speculative:
            self.uses[key] += 1

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate with the fewest uses; of equals the lowest key."""
        return lowest(self.uses, candidates)


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


class Fiddler(Policy):
    """Keep each layer's most used experts; run other misses on the CPU if the batch is small.

    Fiddler (arXiv 2402.07033) weighs tokens x CPU time against the copy; ``tokens`` is the
    batch up to which the CPU wins.
    """

    requires = frozenset({"counts", "cpu"})

    def __init__(self, context: Context, tokens: int = 4) -> None:
        if context.counts is None:
            raise PolicyError("policy 'fiddler' needs the expert counts of a calibration trace")
        order = np.argsort(-context.counts, axis=1, kind="stable")
        self.rank = np.argsort(order, axis=1).ravel()  # of a key among its layer's
        self.keep = self.rank < context.slots
        self.tokens = tokens

    def on_resize(self, slots: int) -> None:
        """Keep as many of each layer's most used experts as it has ``slots``."""
        for key in range(len(self.keep)):
            self.keep[key] = self.rank[key] < slots

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD what is to be kept, and any expert in a larger batch; COMPUTE the others."""
        if self.keep[step.experts[rank]] or step.tokens > self.tokens:
            return LOAD
        return COMPUTE

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The first candidate that is not to be kept, if ``incoming`` is; else -1."""
        if self.keep[incoming]:
            for i in range(len(candidates)):
                if not self.keep[candidates[i]]:
                    return int(candidates[i])
        return -1


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
