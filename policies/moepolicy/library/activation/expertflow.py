"""ExpertFlow: what is predicted for the pass stays, the rest goes first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.passes import count_pass
from moepolicy.library.selection import top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class ExpertFlow(Policy):
    """Evict what is not predicted for this pass, fetch what is (the cache of ExpertFlow,
    2410.17954).

    As a pass begins, the experts of all layers are predicted from its tokens. The victim is the
    least recently used of those not predicted, else of all. The next layer's predicted experts are
    fetched straight into slots.

    A departure: the paper's predictor is a transformer trained offline on the tokens' embeddings.
    Here each token predicts its top_k most counted experts a layer, counted while it runs, of
    decoded tokens, by the token's id modulo ``buckets``; a token not seen before predicts nothing.
    The paper's grouping of sequences into batches is no policy's part.
    """

    requires = frozenset({"tokens"})
    stage_prefetches = False
    always_evicts = True

    def __init__(self, context: Context, buckets: int = 1024) -> None:
        if buckets < 1:
            raise PolicyUsageError(f"expertflow: buckets must be 1 or more, not {buckets}")
        self.n_layers = context.n_layers
        self.n_experts = context.n_experts
        self.top_k = min(context.top_k, context.n_experts)
        self.passes = np.zeros(2, np.int64)
        self.used = np.zeros(context.n_keys, np.int64)
        self.predicted_in = np.full(context.n_keys, -1, np.int64)
        self.counts = np.zeros((buckets, context.n_layers, context.n_experts), np.int32)
        self.best = np.zeros(context.n_experts, np.int32)

    def on_step(self, step: Step) -> None:
        """Predict as a pass begins; count a decoded token's experts."""
        before = self.passes[0]
        if count_pass(self.passes, step) != before:
            for i in range(len(step.token_ids)):
                self.predict(step.token_ids[i] % len(self.counts))
        if step.tokens == 1 and len(step.token_ids) == 1:
            row = self.counts[step.token_ids[0] % len(self.counts), step.layer]
            for rank in range(len(step.experts)):
                row[step.experts[rank] - step.layer * self.n_experts] += 1

    def predict(self, bucket: int) -> None:
        """Mark the most counted experts of a bucket, in all layers."""
        for layer in range(self.n_layers):
            first = layer * self.n_experts
            n = top_n(self.counts[bucket, layer], self.top_k, first, self.best)
            for i in range(n):
                key = self.best[i]
                if self.counts[bucket, layer, key - first] > 0:
                    self.predicted_in[key] = self.passes[0]

    def on_hit(self, key: int, now: int) -> None:
        """Note the time of the use."""
        self.used[key] = now

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note the time of the load, a guess or not, as a use."""
        self.used[key] = now

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's experts that are predicted for this pass."""
        if step.layer + 1 >= self.n_layers:
            return 0
        first = (step.layer + 1) * self.n_experts
        n = 0
        for key in range(first, first + self.n_experts):
            if self.predicted_in[key] == self.passes[0]:
                keys[n] = key
                n += 1
        return n

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The least recently used candidate that is not predicted, else of all."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            key = candidates[i]
            stays = self.predicted_in[key] == self.passes[0]
            others = self.predicted_in[best] == self.passes[0]
            if stays < others or (stays == others and self.used[key] < self.used[best]):
                best = key
        return int(best)
