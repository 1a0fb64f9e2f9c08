"""AdapMoE's cache allocation: layers share the slots by what each gains from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.budget.planned import frequent_hits, planned_slots
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Context, Same


class AdapmoeSlots(Lru):
    """LRU in layers that share the slots by AdapMoE's dynamic programming (2408.10284).

    AdapMoE gives layer l k_l slots, with the sum fixed, so that the expected loads of a token are
    fewest. AdapMoE takes each layer's experts to be used alike, and layers to differ in how often
    the second expert is dropped and in how well the next gate predicts. Here nothing is dropped or
    prefetched, and layers differ in how often their experts are used: a cache of k slots is taken
    to hit as often as the layer's k most used experts are used in the calibration trace. A layer
    may have none (of AdapMoE at least one). In a cache of all layers the policy is LRU.
    """

    requires = frozenset({"counts"})

    @classmethod
    def same_as(cls, context: Context) -> Same | None:
        """LRU in a cache of all layers."""
        if (same := super().same_as(context)) is None and context.scope == "global":
            same = Same("lru", "one cache of all layers leaves no slots to share out")
        return same

    @classmethod
    def share_slots(cls, total: int, context: Context) -> NDArray[np.int64]:
        """The shares with the most hits, int64[n_layers]."""
        assert context.counts is not None  # or what makes caches had refused it
        return planned_slots(frequent_hits(context.counts), total)
