"""HybriMoE: one score for eviction and prefetching, misses taken from two ends by link and CPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.library.probabilities import softmax
from moepolicy.library.selection import lowest, top_n
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class HybriMoe(Policy):
    """Keep the experts of the greatest decaying gate score; link and CPU share the misses
    (HybriMoE, 2504.05897).

    At a step of its layer an expert's score S becomes ``alpha`` x its gate probability, if that is
    among the 2 x top_k greatest, + (1 - ``alpha``) x S. The victim has the least S, and the next
    layer's ``n`` greatest (0: as many as a token uses) are fetched straight into slots. Misses are
    taken from two ends: the link the heaviest, the CPU the lightest, each time whichever would be
    done first. ``cpu_over_copy`` is the time of one token's expert on the CPU over that of a copy;
    a batch's takes as many times longer as it has tokens an expert.

    S and the prefetch are as in the authors' code (``KScoreAwareCache``), which scores a fixed
    number of experts, 12. Departures: the paper also simulates which of the next layers' experts
    gain most; there the time of both sides is measured, here ``cpu_over_copy`` is given.
    """

    requires = frozenset({"logits", "cpu"})
    stage_prefetches = False
    always_evicts = True

    def __init__(
        self, context: Context, alpha: float = 0.5, n: int = 0, cpu_over_copy: float = 1.0
    ) -> None:
        if not 0 < alpha <= 1:
            raise PolicyUsageError(f"hybrimoe: alpha must be above 0, up to 1, not {alpha}")
        if not 0 <= n <= context.n_experts:
            raise PolicyUsageError(f"hybrimoe: n must be 0 to {context.n_experts}, not {n}")
        if cpu_over_copy <= 0:
            raise PolicyUsageError(f"hybrimoe: cpu_over_copy must be above 0, not {cpu_over_copy}")
        self.alpha = float(alpha)
        self.top_k = context.top_k
        self.n = n or min(context.top_k, context.n_experts)
        self.cpu_over_copy = float(cpu_over_copy)
        self.n_layers = context.n_layers
        self.n_experts = context.n_experts
        self.score = np.zeros(context.n_keys)
        self.held = np.zeros(context.n_keys, np.bool_)
        self.on_cpu = np.zeros(context.n_experts, np.bool_)  # by rank, of the step's misses
        self.likely = np.zeros(context.n_experts)
        self.best = np.zeros(context.n_experts, np.int32)

    def on_step(self, step: Step) -> None:
        """Renew the layer's scores, and share the step's misses out."""
        if softmax(step.logits, self.likely):
            self.renew(step.layer * self.n_experts)
        self.share(step)

    def renew(self, first: int) -> None:
        """Let the scores of the layer that begins at key ``first`` decay, and add the best."""
        for e in range(self.n_experts):
            self.score[first + e] *= 1.0 - self.alpha
        n = top_n(self.likely, 2 * self.top_k, first, self.best)
        for i in range(n):
            key = self.best[i]
            self.score[key] += self.alpha * self.likely[key - first]

    def share(self, step: Step) -> None:
        """Mark the ranks whose misses the CPU takes."""
        each = step.tokens * self.top_k / len(step.experts)  # tokens an expert
        cost = self.cpu_over_copy * max(each, 1.0)
        copied, computed = 0.0, 0.0
        first, last = 0, len(step.experts) - 1
        while first <= last:
            if self.held[step.experts[first]]:
                first += 1
            elif self.held[step.experts[last]]:
                last -= 1
            elif copied + 1.0 <= computed + cost:
                copied += 1.0
                self.on_cpu[first] = False
                first += 1
            else:
                computed += cost
                self.on_cpu[last] = True
                last -= 1

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def on_miss(self, step: Step, rank: int) -> int:
        """COMPUTE what the CPU's end has taken, LOAD the others."""
        return COMPUTE if self.on_cpu[rank] else LOAD

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The next layer's ``n`` experts of the greatest score, as far as any have one."""
        if step.layer + 1 >= self.n_layers:
            return 0
        first = (step.layer + 1) * self.n_experts
        n = top_n(self.score[first : first + self.n_experts], self.n, first, keys)
        while n > 0 and self.score[keys[n - 1]] <= 0:
            n -= 1
        return n

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least score."""
        return lowest(self.score, candidates)
