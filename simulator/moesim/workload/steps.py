"""A routing trace as the sequence of expert steps that every engine replays.

A decoded token is one step a layer; a prompt (a run of consecutive prompt tokens of a sequence)
is one step a layer with the union of its tokens' experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    NO_TOKEN_IDS,
    Context,
    PolicySpec,
    RoutingRule,
    Step,
    TokenRows,
    next_use,
    pool_logits,
)
from moepolicy.library.clairvoyant.future import BLOCK
from moeroute.schema import TraceMeta
from moeroute.weight_rules import detect_weight_rule
from numpy.typing import NDArray

from moesim.errors import UsageError
from moesim.workload.details import Details

SHOWING = 4096  # rows from which the gates' rule of weights is found
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
    token_ids int32[rows] of the trace's rows; None where no policy asks for them
    row_experts, row_weights  [rows, K] of the trace's rows; None where no policy routes

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
    token_ids: NDArray[np.int32] | None = None
    row_experts: NDArray[np.int32] | None = None
    row_weights: NDArray[np.float32] | None = None

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
            raise UsageError.of("tokens", f"must be 1 or more, not {n_tokens}")
        starts = np.flatnonzero(np.diff(self.rows[:, 0], prepend=-1))
        before = np.concatenate(([0], np.cumsum(self.tokens[starts])))[:-1]
        later = starts[before >= n_tokens]
        n = int(later[0]) if len(later) else self.n_steps
        return replace(self._cut(0, n), starts=self.starts[self.starts < n])

    def sequences(self) -> Iterator[Workload]:
        """Each sequence as a workload of its own: its future ends with it."""
        for first, last in pairwise([*self.starts.tolist(), self.n_steps]):
            yield self if last - first == self.n_steps else self._cut(first, last)

    def only(self, sequences: Sequence[int]) -> Workload:
        """The workload of some of the trace's sequences, by number, in their order."""
        bounds = [*self.starts.tolist(), self.n_steps]
        spans = [range(bounds[i], bounds[i + 1]) for i in sequences]
        if not spans:
            raise UsageError("no sequence is left to replay")
        steps = np.concatenate(spans)
        demand = np.concatenate(
            [np.arange(self.offsets[span.start], self.offsets[span.stop]) for span in spans]
        )
        n_keys = np.diff(self.offsets)[steps]
        return replace(
            self,
            keys=self.keys[demand],
            weights=self.weights[demand],
            routed=self.routed[demand],
            offsets=np.concatenate([[0], np.cumsum(n_keys)]).astype(np.int64),
            layer=self.layer[steps],
            tokens=self.tokens[steps],
            decode=self.decode[steps],
            rows=self.rows[steps],
            starts=np.cumsum([0, *map(len, spans)])[:-1],
        )

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
        requires = policy.requires
        vars(found).update(
            predicted=self.predicted[: policy.horizon],
            logits=self.logits if "logits" in requires else None,
            token_ids=self.token_ids if "tokens" in requires else None,
            row_experts=self.row_experts if policy.routes else None,
            row_weights=self.row_weights if policy.routes else None,
        )
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
            token_ids=self._token_ids(number),
            begins_pass=bool(self.begins_pass[number]),
            begins_sequence=self._begins_sequence(number),
        )

    @cached_property
    def weight_rule(self) -> RoutingRule | None:
        """How the model's gates make weights: as the trace's metadata says or, where they do not,
        as its first rows show; None where neither does."""
        if (named := self.meta.weight_rule) is not None:
            return RoutingRule(named, self.meta.weight_scale or 1.0)
        if self.logits is None or self.row_weights is None or self.row_experts is None:
            return None
        some = slice(0, SHOWING)
        found = detect_weight_rule(
            self.logits[some], self.row_weights[some], self.row_experts[some]
        )
        return RoutingRule(found.name, found.scale) if found else None

    def rows_of(self, number: int) -> TokenRows | None:
        """The token rows of step ``number``, for a policy that routes to rewrite; None where no
        policy does."""
        if self.row_experts is None or self.row_weights is None or self.logits is None:
            return None
        at = self._trace_rows(number)
        return TokenRows(self.row_experts[at], self.row_weights[at], _wide(self.logits, at))

    def _token_ids(self, number: int) -> NDArray[np.int32]:
        return NO_TOKEN_IDS if self.token_ids is None else self.token_ids[self._trace_rows(number)]

    def _begins_sequence(self, number: int) -> bool:
        at = int(self.starts.searchsorted(number))
        return at < len(self.starts) and bool(self.starts[at] == number)

    def _trace_rows(self, number: int) -> NDArray[np.int64]:
        """The rows of the trace that step ``number`` is made of, ascending."""
        (first, last), layer = self.rows[number], self.layer[number]
        if last - first == self.meta.n_layers:
            return np.array([first + layer])
        found: NDArray[np.int64] = first + np.flatnonzero(self.row_layer[first:last] == layer)
        return found

    def details(self, first: int, last: int) -> Details:
        """What policies may look at of steps first..last-1."""
        logits, predicted = self._gates(first, last)
        n, n_experts, top_k = last - first, self.meta.n_experts, self.meta.top_k
        begins_sequence = np.zeros(n, np.bool_)
        begins_sequence[self.starts[(self.starts >= first) & (self.starts < last)] - first] = True
        offsets = np.zeros(n + 1, np.int64)
        token_ids = NO_TOKEN_IDS
        rows = TokenRows(
            np.empty((0, top_k), np.int32),
            np.empty((0, top_k), np.float32),
            np.empty((0, n_experts), np.float32),
        )
        if self.token_ids is not None or self.row_experts is not None:
            np.cumsum(self.tokens[first:last], out=offsets[1:])
            at = np.concatenate([self._trace_rows(i) for i in range(first, last)])
            if self.token_ids is not None:
                token_ids = self.token_ids[at]
            if self.row_experts is not None and self.row_weights is not None:
                assert self.logits is not None  # a policy that routes requires them
                rows = TokenRows(self.row_experts[at], self.row_weights[at], _wide(self.logits, at))
        begins_pass = self.begins_pass[first:last]
        return Details(logits, predicted, begins_pass, begins_sequence, offsets, token_ids, *rows)

    def _gates(self, first: int, last: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits [steps, E] and predictions [steps, horizon, E] of steps first..last-1; where
        there are none to look at, one row that stands for every step."""
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


def _wide(logits: NDArray[np.float16], at: NDArray[np.int64]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = logits[at].astype(np.float32)
    return found


def changes(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; one entry fewer than ``column``."""
    changed: NDArray[np.bool_] = column[1:] != column[:-1]
    return changed


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))
