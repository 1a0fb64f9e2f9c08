"""Fiddler: misses on the CPU where the batch is small."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.policy import Context, Policy, PolicyError
from moepolicy.steps import Step


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
