"""Fate: the next gate's choice and some more, in an ARC cache whose first layers stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.adaptive.arc import Arc
from moepolicy.library.probabilities import is_predicted
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step

SHALLOW = 4  # layers at the beginning, which the gates before them predict badly


class Fate(Arc):
    """ARC that fetches the next gate's choice and ``more`` candidates, and keeps the first layers
    (Fate, 2502.12224).

    The next layer's top_k + ``more`` likeliest experts, by its gate on this layer's hidden state,
    are fetched straight into slots. The first four layers, which are predicted badly, stay whole:
    they get a slot for every expert, or as many of them as leave each other layer top_k slots. In a
    cache that all layers share, their experts are no victims while others can be.

    Departures: the paper takes as many further candidates as the time of a layer leaves room for;
    here it is ``more``. The paper's precisions (4 and 2 bits by popularity) are not part of it.
    """

    requires = frozenset({"predictions"})
    stage_prefetches = False

    def __init__(self, context: Context, more: int = 1) -> None:
        super().__init__(context)
        if more < 0:
            raise PolicyUsageError(f"fate: more must be 0 or more, not {more}")
        self.n = min(context.top_k + more, context.n_experts)
        self.n_experts = context.n_experts
        self.first_free = min(SHALLOW, context.n_layers) * context.n_experts
        self.others = np.zeros(context.n_keys, np.int32)
        if context.scope == "layer":
            # ARC's of the later layers; the first ones never evict, or are as the others.
            total = min(context.slots, context.n_experts) * context.n_layers
            self.capacity = int(self.share_slots(total, context)[-1])

    @classmethod
    def share_slots(cls, total: int, context: Context) -> NDArray[np.int64]:
        """All experts of the first layers that fit, the rest shared equally; int64[n_layers]."""
        layers, experts = context.n_layers, context.n_experts
        n = min(SHALLOW, layers)
        while n > 0 and n * experts + (layers - n) * context.top_k > total:
            n -= 1
        shares = np.full(layers, experts, np.int64)
        rest = total - n * experts
        shares[n:] = rest // max(layers - n, 1)
        if n < layers:
            shares[n : n + rest % (layers - n)] += 1
        return shares

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next gate's choice and some more, likeliest first."""
        if not is_predicted(step, 0):
            return 0
        return top_n(step.predicted[0], self.n, (step.layer + 1) * self.n_experts, keys)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """ARC's victim among the candidates of later layers, if there are any."""
        n = 0
        for i in range(len(candidates)):
            if candidates[i] >= self.first_free:
                self.others[n] = candidates[i]
                n += 1
        return self.choose(incoming, self.others[:n] if n else candidates)
