"""Pre-gated MoE, emulated: the next layer's predicted experts are its routing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.probabilities import is_predicted
from moepolicy.library.routing.ahead import RoutesAhead
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, PolicyUsageError
from moepolicy.steps import Step


class PreGated(RoutesAhead):
    """Route by the gate on the last layer's hidden state, and fetch its choice ahead (an emulation
    of Pre-gated MoE, 2308.12066).

    The top_k experts of gate[l + 1] on the hidden state of layer l are committed as the routing of
    layer l + 1 of a decoded token, and fetched into ``staging`` buffers (0: two tokens' experts)
    while layer l computes. The first layer, and prompts, keep their gates' choice. Eviction is LRU.

    An emulation: the paper fine-tunes gates to choose for the layer after; those of a stock model
    were trained for their own. What this changes in the text is worse than what the paper reports.
    The weights are those that the layer's own gate gives the committed experts.
    """

    requires = frozenset({"predictions"})

    def __init__(self, context: Context, staging: int = 0) -> None:
        super().__init__(context)
        if staging < 0:
            raise PolicyUsageError(f"pre-gated: staging must be 0 or more, not {staging}")
        self.staging = staging or 2 * self.top_k

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The experts that were predicted, where they were."""
        if self.foresaw(step):
            top_n(self.ahead, len(chosen), 0, chosen)

    def on_step(self, step: Step) -> None:
        """Remember the next layer's prediction."""
        self.look_ahead(step)

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's choice; of a batch the likeliest as many, which commit nothing."""
        if not is_predicted(step, 0):
            return 0
        return top_n(step.predicted[0], self.top_k, (step.layer + 1) * self.n_experts, keys)
