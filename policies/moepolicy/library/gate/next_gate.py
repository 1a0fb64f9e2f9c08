"""Prefetching by the next layer's gate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.selection import top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class NextGate(Policy):
    """Fetch the ``n`` likeliest experts of the next layer, by its gate on this hidden state."""

    requires = frozenset({"predictions"})

    def __init__(self, context: Context, n: int = 2) -> None:
        if not 1 <= n <= context.n_experts:
            raise PolicyUsageError(f"gate: n must be 1 to {context.n_experts}, not {n}")
        self.n = n
        self.n_experts = context.n_experts

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's ``n`` likeliest experts; none where its gate has not been predicted."""
        predicted = step.predicted
        if predicted.shape[0] == 0 or np.isnan(predicted[0, 0]):
            return 0
        return top_n(predicted[0], self.n, (step.layer + 1) * self.n_experts, keys)
