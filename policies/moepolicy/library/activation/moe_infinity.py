"""MoE-Infinity: match this sequence's activations to those of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step

TINY = 1e-8  # of the priority of an expert that the matched sequence never used
SMALL = 1e-6  # added to both shares of the keep score


class MoeInfinity(Policy):
    """Fetch what the most similar earlier sequence used, keep what this one uses (MoE-Infinity,
    2401.14361).

    A sequence is the matrix of its uses [layers, experts]. At layer l the matrices of the last
    ``capacity`` sequences, less those matched least, are compared with the one in progress: by the
    mean cosine of the rows up to l. Of the best one, M, an expert of a later layer l' has the
    priority (M[l', e] + 1e-8) (1 - (l' - l) / (L + 1)), rows of M adding up to 1. Of the missing
    ones that M has at all the ``n`` of the greatest (0: as many as a token uses) are fetched
    straight into slots. The victim has the least product of: 1 - layer / (L + 1), its share of its
    row in this sequence, its share of all uses since the start.

    The store begins with the sequences of a calibration trace where the policy is fitted (`moesim
    fit moe-infinity`), as the paper's does.

    Read besides the paper: ``expert_priority_score.py`` and ``finish_entry`` of the released code.
    Departures: the paper asks for all later experts in the order of priority, here ``n`` a step;
    a batch counts as one use of each of its experts; the code's score also sets the layers up to
    the one in progress to 1, for encoders and decoders apart.
    """

    stage_prefetches = False
    always_evicts = True

    def __init__(
        self,
        context: Context,
        capacity: int = 32,
        n: int = 0,
        params: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        if capacity < 1:
            raise PolicyUsageError(f"moe-infinity: capacity must be 1 or more, not {capacity}")
        if not 0 <= n <= context.n_keys:
            raise PolicyUsageError(f"moe-infinity: n must be 0 to {context.n_keys}, not {n}")
        layers, experts = context.n_layers, context.n_experts
        self.n = n or min(context.top_k, experts)
        self.n_layers = layers
        self.n_experts = experts
        self.held = np.zeros(context.n_keys, np.bool_)
        self.uses = np.zeros(context.n_keys)
        self.all_uses = np.zeros(1)
        self.sequence = np.zeros((layers, experts))  # uses of the sequence in progress
        self.row_uses = np.zeros(layers)
        self.stored = np.zeros((capacity, layers, experts))  # rows add up to 1
        self.length = np.zeros((capacity, layers))  # of the rows, as vectors
        self.matches = np.zeros(capacity, np.int64)
        self.cosine = np.zeros((capacity, layers))  # of the stored rows and the sequence's
        self.n_stored = np.zeros(1, np.int64)
        self.best = np.full(1, -1, np.int64)  # the sequence matched now
        if params is not None:
            n_given = min(capacity, len(params["stored"]))
            self.stored[:n_given] = params["stored"][:n_given]
            self.length[:n_given] = params["length"][:n_given]
            self.matches[:n_given] = 1
            self.n_stored[0] = n_given

    @classmethod
    def fit(
        cls, context: Context, steps: Iterable[Step], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """Store the matrices of the trace's sequences, as many as are kept by default."""
        storing = cls(context)
        for step in steps:
            storing.on_step(step)
        storing.store()
        n = int(storing.n_stored[0])
        return {"stored": storing.stored[:n].copy(), "length": storing.length[:n].copy()}

    def on_step(self, step: Step) -> None:
        """Store a sequence that has ended; count the uses and match anew."""
        if step.begins_sequence:
            self.store()
        layer = step.layer
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            self.uses[key] += 1.0
            self.all_uses[0] += 1.0
            self.sequence[layer, key - layer * self.n_experts] += 1.0
            self.row_uses[layer] += 1.0
        self.match(layer)

    def store(self) -> None:
        """Keep the sequence's matrix, in place of the one matched least once all have one."""
        total = 0.0
        for layer in range(self.n_layers):
            total += self.row_uses[layer]
        if total > 0:
            self.keep(self.place())
        self.sequence[:] = 0.0
        self.row_uses[:] = 0.0
        self.cosine[:] = 0.0

    def place(self) -> int:
        """Where the next matrix goes."""
        if self.n_stored[0] < len(self.stored):
            self.n_stored[0] += 1
            return int(self.n_stored[0]) - 1
        least = 0
        for i in range(1, len(self.stored)):
            if self.matches[i] < self.matches[least]:
                least = i
        return least

    def keep(self, place: int) -> None:
        """Write the sequence's matrix to ``place``, its rows made to add up to 1."""
        self.matches[place] = 1
        for layer in range(self.n_layers):
            squares = 0.0
            for e in range(self.n_experts):
                share = self.sequence[layer, e] / max(self.row_uses[layer], 1.0)
                self.stored[place, layer, e] = share
                squares += share * share
            self.length[place, layer] = math.sqrt(squares)

    def match(self, layer: int) -> None:
        """Renew the cosines of the row of ``layer``, and find the best match of rows up to it."""
        self.best[0] = -1
        most = 0.0
        squares = 0.0
        for e in range(self.n_experts):
            squares += self.sequence[layer, e] * self.sequence[layer, e]
        for i in range(self.n_stored[0]):
            lengths = math.sqrt(squares) * self.length[i, layer]
            product = 0.0
            for e in range(self.n_experts):
                product += self.sequence[layer, e] * self.stored[i, layer, e]
            self.cosine[i, layer] = product / lengths if lengths > 0 else 0.0
            total = 0.0
            for row in range(layer + 1):
                total += self.cosine[i, row]
            if self.best[0] < 0 or total > most:
                self.best[0] = i
                most = total
        if self.best[0] >= 0:
            self.matches[self.best[0]] += 1

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The missing experts of later layers that the matched sequence used most."""
        if self.best[0] < 0:
            return 0
        first = (step.layer + 1) * self.n_experts
        n, last, last_priority = 0, -1, 0.0
        while n < min(self.n, len(keys)):
            found, most = -1, 0.0
            for key in range(first, self.n_layers * self.n_experts):
                priority = self.priority(step.layer, key)
                behind = last < 0 or priority < last_priority
                behind = behind or (priority == last_priority and key > last)
                if behind and priority > most and not self.held[key]:
                    found, most = key, priority
            if found < 0:
                break
            keys[n] = found
            n += 1
            last, last_priority = found, most
        return n

    def priority(self, layer: int, key: int) -> float:
        """How much the matched sequence asks for ``key`` while ``layer`` runs; 0: never used."""
        ahead = key // self.n_experts
        share = self.stored[self.best[0], ahead, key % self.n_experts]
        if share <= 0:
            return 0.0
        return float((share + TINY) * (1.0 - (ahead - layer) / (self.n_layers + 1)))

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least keep score; of equals the lowest key."""
        best, least = -1, 0.0
        for i in range(len(candidates)):
            score = self.score(candidates[i])
            if best < 0 or score < least:
                best, least = int(candidates[i]), score
        return best

    def score(self, key: int) -> float:
        """How much is in favour of keeping ``key``."""
        layer = key // self.n_experts
        in_row = self.sequence[layer, key % self.n_experts] / max(self.row_uses[layer], 1.0)
        decay = 1.0 - layer / (self.n_layers + 1)
        return float(
            decay * (in_row + SMALL) * (self.uses[key] / max(self.all_uses[0], 1.0) + SMALL)
        )
