"""A routing trace as the sequence of expert steps that every engine replays.

A decoded token is one step a layer; a prompt (a run of consecutive prompt tokens of a sequence)
is one step a layer with the union of its tokens' experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    Context,
    PolicySpec,
    Step,
    next_use,
    pool_logits,
)
from moepolicy.clairvoyant import BLOCK
from moeroute.schema import TraceMeta
from numpy.typing import NDArray

from moesim.errors import UsageError

CHUNK = 1 << 15  # steps whose logits and predictions are in memory together


@dataclass(frozen=True)
class Workload:
    """The steps of one trace, as arrays over the ``S`` steps and their ``D`` demanded keys.

    keys      int32[D] the steps' demands one after the other, each in router order
    weights   float32[D] gate weights as applied, summed over the step's tokens
    routed    int32[D] how many of the step's tokens use the key
    offsets   int64[S + 1] step s demands keys[offsets[s]:offsets[s + 1]]
    layer     int32[S]
    tokens    int32[S] tokens the step serves
    decode    bool[S] a decoded token's step (else a prompt's)
    rows      int64[S, 2] the trace rows first and one past the last of the step's token or prompt
    starts    int64[Q] the step that each of the trace's sequences begins with, the first 0

    ``calibration``, int64[n_layers, n_experts], is how often another trace uses each expert.

    The class is long because every cut of a workload (first steps, a sequence, other sizes, what
    a policy may see) has to cut all of these arrays alike.
    """

    meta: TraceMeta
    title: str
    digest: str
    keys: NDArray[np.int32]
    weights: NDArray[np.float32]
    routed: NDArray[np.int32]
    offsets: NDArray[np.int64]
    layer: NDArray[np.int32]
    tokens: NDArray[np.int32]
    decode: NDArray[np.bool_]
    rows: NDArray[np.int64]
    row_layer: NDArray[np.int32]
    logits: NDArray[np.float16] | None
    predicted: tuple[NDArray[np.float16], ...]
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    maps: tuple[mmap.mmap, ...] = ()  # of the files that the arrays lie in, if they do
    calibration: NDArray[np.int64] | None = None

    @property
    def n_steps(self) -> int:
        """Steps of all layers."""
        return len(self.layer)

    @property
    def n_keys(self) -> int:
        """All experts of all layers."""
        return self.meta.n_layers * self.meta.n_experts

    def release(self) -> None:
        """Free the memory of arrays that lie in files; the files are read again when used."""
        for mapping in self.maps:
            mapping.madvise(mmap.MADV_DONTNEED)

    def head(self, n_tokens: int) -> Workload:
        """The workload's first ``n_tokens`` tokens; a prompt that begins among them is whole."""
        if n_tokens < 1:
            raise UsageError(f"tokens must be 1 or more, not {n_tokens}")
        starts = np.flatnonzero(np.diff(self.rows[:, 0], prepend=-1))
        before = np.concatenate(([0], np.cumsum(self.tokens[starts])))[:-1]
        later = starts[before >= n_tokens]
        n = int(later[0]) if len(later) else self.n_steps
        return replace(self._cut(0, n), starts=self.starts[self.starts < n])

    def sequences(self) -> Iterator[Workload]:
        """Each sequence as a workload of its own: its future ends with it."""
        for first, last in pairwise([*self.starts.tolist(), self.n_steps]):
            yield self if last - first == self.n_steps else self._cut(first, last)

    def _cut(self, first: int, last: int) -> Workload:
        """Steps first..last-1 as one sequence; the trace's columns are shared."""
        steps = slice(first, last)
        demand = slice(int(self.offsets[first]), int(self.offsets[last]))
        return replace(
            self,
            keys=self.keys[demand],
            weights=self.weights[demand],
            routed=self.routed[demand],
            offsets=self.offsets[first : last + 1] - self.offsets[first],
            layer=self.layer[steps],
            tokens=self.tokens[steps],
            decode=self.decode[steps],
            rows=self.rows[steps],
            starts=np.zeros(1, np.int64),
        )

    @cached_property
    def n_decoded(self) -> int:
        """Decoded tokens: the steps of the layer that most of them have."""
        return self._count_tokens(True)

    @cached_property
    def n_prompt(self) -> int:
        """Number of prompt tokens."""
        return self._count_tokens(False)

    def _count_tokens(self, decode: bool) -> int:
        per_layer = np.zeros(self.meta.n_layers, np.int64)
        for steps in _blocks(self.n_steps):
            chosen = self.decode[steps] == decode
            np.add.at(per_layer, self.layer[steps][chosen], self.tokens[steps][chosen])
            self.release()
        return int(per_layer.max())

    @cached_property
    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The least and the most tokens that a step serves, and that a step's key is used by."""
        return self._extent(self.tokens), self._extent(self.routed)

    def _extent(self, column: NDArray[np.int32]) -> tuple[int, int]:
        least, most = int(column[0]), int(column[0])
        for some in _blocks(len(column)):
            least = min(least, int(column[some].min()))
            most = max(most, int(column[some].max()))
            self.release()
        return least, most

    @cached_property
    def begins_pass(self) -> NDArray[np.bool_]:
        """bool[S]: whether the step is the first of its forward pass."""
        return np.append(True, changes(self.rows[:, 0]))

    @cached_property
    def next_use(self) -> NDArray[np.int64]:
        """int64[D]: the step that next demands each demanded key."""
        return next_use(self.keys, self.offsets)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """int64[n_layers, n_experts]: what a calibration trace says of each expert's use; without
        one, how many of the steps demand it."""
        if self.calibration is not None:
            return self.calibration
        counts = np.zeros(self.n_keys, np.int64)
        for some in _blocks(len(self.keys)):
            counts += np.bincount(self.keys[some], minlength=self.n_keys)
            self.release()
        return counts.reshape(self.meta.n_layers, self.meta.n_experts)

    def calibrated(self, counts: NDArray[np.int64]) -> Workload:
        """The same steps, with ``counts`` [n_layers, n_experts] for what another trace told."""
        found = copy(self)  # and not a new one: what has been derived stays so
        vars(found).update(calibration=counts, counts=counts)
        return found

    def shown_to(self, policy: PolicySpec) -> Workload:
        """The same steps with the logits and predictions that ``policy`` requires, and no more."""
        found = copy(self)
        logits = self.logits if "logits" in policy.requires else None
        vars(found).update(predicted=self.predicted[: policy.horizon], logits=logits)
        return found

    def sized(self, meta: TraceMeta) -> Workload:
        """The same steps of a model with the sizes of ``meta``."""
        found = copy(self)
        vars(found).update(meta=meta)
        return found

    def context(self, slots: int, scope: str) -> Context:
        """What a policy is made from, clairvoyant knowledge included."""
        return Context(
            n_layers=self.meta.n_layers,
            n_experts=self.meta.n_experts,
            top_k=self.meta.top_k,
            slots=slots,
            scope=scope,
            counts=self.counts,
            next_use=self.next_use,
            offsets=self.offsets,
            demands=self.keys,
        )

    def step(self, number: int, *, detail: bool = True) -> Step:
        """Step ``number``; ``detail=False`` leaves out logits and predictions."""
        demand = slice(self.offsets[number], self.offsets[number + 1])
        layer = int(self.layer[number])
        return Step(
            number=number,
            layer=layer,
            experts=self.keys[demand],
            weights=self.weights[demand],
            logits=self._pooled(self.logits, number, layer) if detail else NO_LOGITS,
            predicted=self._predictions(number, layer) if detail else NO_PREDICTIONS,
            tokens=int(self.tokens[number]),
        )

    def details(self, first: int, last: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits [steps, E] and predictions [steps, horizon, E] of steps first..last-1.

        Where there are none to look at, one row that stands for every step.
        """
        logits, predicted = NO_LOGITS[None], NO_PREDICTIONS[None]
        n, n_experts = last - first, self.meta.n_experts
        if self.logits is not None:
            logits = np.empty((n, n_experts), np.float32)
            self._fill(logits, self.logits, first, 0)
        if self.predicted:
            predicted = np.empty((n, len(self.predicted), n_experts), np.float32)
            for j, column in enumerate(self.predicted):
                self._fill(predicted[:, j], column, first, j + 1)
        return logits, predicted

    def _fill(
        self, found: NDArray[np.float32], column: NDArray[np.float16], first: int, ahead: int
    ) -> None:
        """Write a gate column's row for each step from ``first`` on into ``found``, ``ahead``
        layers further on; NaN past them."""
        steps = slice(first, first + len(found))
        rows, layer = self.rows[steps], self.layer[steps] + ahead
        outside = layer >= self.meta.n_layers
        wanted = rows[:, 0] + layer
        found[:] = column.take(wanted, axis=0, mode="clip")
        found[outside] = np.nan
        batches = (rows[:, 1] - rows[:, 0] != self.meta.n_layers) & ~outside
        for i in np.flatnonzero(batches).tolist():
            found[i] = self._pooled(column, first + i, int(layer[i]))

    def _pooled(
        self, column: NDArray[np.float16] | None, number: int, layer: int
    ) -> NDArray[np.float32]:
        """A gate's logits for the step's tokens at ``layer``; empty where the trace has none."""
        if column is None:
            return NO_LOGITS
        first, last = self.rows[number]
        if last - first == self.meta.n_layers and layer < self.meta.n_layers:
            return pool_logits(column[first + layer : first + layer + 1])
        at = first + np.flatnonzero(self.row_layer[first:last] == layer)
        return pool_logits(column[at]) if len(at) else np.full(column.shape[1], np.nan, np.float32)

    def _predictions(self, number: int, layer: int) -> NDArray[np.float32]:
        if not self.predicted:
            return NO_PREDICTIONS
        rows = [
            self._pooled(column, number, layer + ahead)
            for ahead, column in enumerate(self.predicted, start=1)
        ]
        return np.stack(rows)


def changes(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; one entry fewer than ``column``."""
    changed: NDArray[np.bool_] = column[1:] != column[:-1]
    return changed


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))
