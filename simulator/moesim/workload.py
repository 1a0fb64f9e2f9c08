"""A routing trace as the sequence of expert steps that every engine replays.

A decoded token is one step a layer; a prompt (a run of consecutive prompt tokens of a sequence)
is one step a layer with the union of its tokens' experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from moepolicy import NO_LOGITS, NO_PREDICTIONS, Context, Step, demand_order, next_use, pool_logits
from moeroute import DECODE, Trace
from moeroute.schema import TraceMeta, prediction_column
from numpy.typing import NDArray

from moesim.errors import SimulationError

BLOCK = 1 << 20  # rows that are made into steps together


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

    @property
    def n_steps(self) -> int:
        return len(self.layer)

    @property
    def n_keys(self) -> int:
        return self.meta.n_layers * self.meta.n_experts

    def head(self, n_tokens: int) -> Workload:
        """The workload's first ``n_tokens`` tokens; a prompt that begins among them is whole."""
        if n_tokens < 1:
            raise SimulationError(f"tokens must be 1 or more, not {n_tokens}")
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
        return self._count_tokens(self.decode)

    @cached_property
    def n_prompt(self) -> int:
        """Prompt tokens."""
        return self._count_tokens(~self.decode)

    def _count_tokens(self, chosen: NDArray[np.bool_]) -> int:
        per_layer = np.bincount(self.layer[chosen], weights=self.tokens[chosen], minlength=1)
        return int(per_layer.max())

    @cached_property
    def begins_pass(self) -> NDArray[np.bool_]:
        """bool[S]: whether the step is the first of its forward pass."""
        return np.append(True, _changes(self.rows[:, 0]))

    @cached_property
    def next_use(self) -> NDArray[np.int64]:
        """int64[D]: the step that next demands each demanded key."""
        return next_use(self.keys, self.offsets)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """int64[n_layers, n_experts]: how many of the steps demand each key."""
        counts = np.bincount(self.keys, minlength=self.n_keys)
        return counts.reshape(self.meta.n_layers, self.meta.n_experts)

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

    def details(
        self, first: int, last: int, *, predictions: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits [steps, E] and predictions [steps, horizon, E] of steps first..last-1.

        Where there are none to look at, one row that stands for every step.
        """
        logits, predicted = NO_LOGITS[None], NO_PREDICTIONS[None]
        if self.logits is not None:
            logits = self._column(self.logits, first, last, 0)
        if predictions and self.predicted:
            ahead = [
                self._column(column, first, last, j)
                for j, column in enumerate(self.predicted, start=1)
            ]
            predicted = np.stack(ahead, axis=1)
        return logits, predicted

    def _column(
        self, column: NDArray[np.float16], first: int, last: int, ahead: int
    ) -> NDArray[np.float32]:
        """A gate column's row for each of the steps, ``ahead`` layers further on; NaN past them."""
        rows, layer = self.rows[first:last], self.layer[first:last] + ahead
        found = np.full((last - first, column.shape[1]), np.nan, np.float32)
        single = rows[:, 1] - rows[:, 0] == self.meta.n_layers
        inside = layer < self.meta.n_layers
        plain = single & inside
        found[plain] = column[rows[plain, 0] + layer[plain]]
        for i in np.flatnonzero(~single & inside).tolist():
            found[i] = self._pooled(column, first + i, int(layer[i]))
        return found

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


def load_workload(trace: Trace, *, logits: bool = False, predictions: bool = False) -> Workload:
    """Read a trace's steps; gate logits and predictions only if some policy looks at them.

    Raises TraceError where the trace lacks a column, SimulationError where its rows make no
    steps.
    """
    columns = trace.arrays("sequence", "position", "phase", "layer", "experts")
    if len(columns["layer"]) == 0:
        raise SimulationError(f"{trace.path}: the trace has no rows")
    _check_range(trace, columns)
    row_layer = columns["layer"].astype(np.int32)
    columns["weights"] = _weights(trace, columns["experts"])
    begins = np.append(0, np.flatnonzero(_changes(columns["sequence"])) + 1)
    steps = _Steps(columns, trace.meta.n_experts).arrays()
    predicted = [prediction_column(j + 1) for j in range(trace.meta.horizon)] if predictions else []
    return Workload(
        meta=trace.meta,
        title=trace.title,
        digest=trace.digest,
        **steps,
        starts=np.searchsorted(steps["rows"][:, 0], begins),
        row_layer=row_layer,
        logits=trace.array("router_logits") if logits else None,
        predicted=tuple(trace.array(name) for name in predicted),
    )


def _check_range(trace: Trace, columns: dict[str, NDArray[Any]]) -> None:
    for name, limit in (("experts", trace.meta.n_experts), ("layer", trace.meta.n_layers)):
        wrong = columns[name] >= limit
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise SimulationError(
                f"{trace.path}: column {name}, row {row}: a value of {limit} or more, "
                f"but the trace's metadata says {limit} {name.rstrip('s')}s"
            )


def _weights(trace: Trace, experts: NDArray[Any]) -> NDArray[np.float32]:
    """Gate weights as applied; a recorder that had none counts every expert alike."""
    if trace.has("weights"):
        return np.asarray(trace.array("weights"), np.float32)
    return np.full(experts.shape, 1.0 / experts.shape[1], np.float32)


def _changes(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; one entry fewer than ``column``."""
    changed: NDArray[np.bool_] = column[1:] != column[:-1]
    return changed


class _Steps:
    """Cuts a trace's rows into stretches of decoded tokens and prompts, and each into steps."""

    def __init__(self, columns: dict[str, NDArray[Any]], n_experts: int) -> None:
        """Takes ``columns`` away as it goes: a long trace fills the memory twice otherwise."""
        self.layer = columns.pop("layer").astype(np.int32)
        self.experts = columns.pop("experts").astype(np.int32)
        self.weights = columns.pop("weights")
        self.n_experts = n_experts
        self.parts: list[dict[str, NDArray[Any]]] = []
        decode = columns.pop("phase") == DECODE
        new_sequence = _changes(columns.pop("sequence"))
        new_token = np.append(True, new_sequence | _changes(columns.pop("position")))
        self.token_starts = np.append(np.flatnonzero(new_token), len(decode))
        change = (decode[1:] != decode[:-1]) | (new_sequence & ~decode[1:])
        edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(decode)]
        for first, last in pairwise(edges):
            if not decode[first]:
                self._prompt(first, last)
                continue
            for start in range(first, last, BLOCK):
                self._decoded(start, min(start + BLOCK, last))

    def arrays(self) -> dict[str, Any]:
        """The workload's arrays; each part's is let go as soon as it is joined."""
        del self.layer, self.experts, self.weights, self.token_starts
        joined = {
            name: np.concatenate([part.pop(name) for part in self.parts])
            for name in list(self.parts[0])
        }
        counts = joined.pop("n_keys")
        joined["offsets"] = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=joined["offsets"][1:])
        return joined

    def _decoded(self, first: int, last: int) -> None:
        """Rows first..last-1 are decoded tokens: each row is a step."""
        n, top_k = last - first, self.experts.shape[1]
        experts, weights = self.experts[first:last], self.weights[first:last]
        order = np.argsort(-weights, axis=1, kind="stable")
        experts = np.take_along_axis(experts, order, axis=1)
        layer = self.layer[first:last]
        bounds = np.searchsorted(self.token_starts, np.arange(first, last), side="right")
        self.parts.append(
            {
                "keys": (experts + layer[:, None] * self.n_experts).astype(np.int32).ravel(),
                "weights": np.take_along_axis(weights, order, axis=1).ravel(),
                "routed": np.ones(n * top_k, np.int32),
                "n_keys": np.full(n, top_k, np.int32),
                "layer": layer,
                "tokens": np.ones(n, np.int32),
                "decode": np.ones(n, np.bool_),
                "rows": np.stack(
                    [self.token_starts[bounds - 1], self.token_starts[bounds]], axis=1
                ),
            }
        )

    def _prompt(self, first: int, last: int) -> None:
        """Rows first..last-1 are one prompt: one step a layer, with the union of its experts."""
        layers = self.layer[first:last]
        for layer in np.unique(layers):
            at = first + np.flatnonzero(layers == layer)
            experts, weights = demand_order(self.experts[at], self.weights[at])
            uses = np.bincount(self.experts[at].ravel(), minlength=self.n_experts)
            self.parts.append(
                {
                    "keys": (experts + layer * self.n_experts).astype(np.int32),
                    "weights": weights,
                    "routed": uses[experts].astype(np.int32),
                    "n_keys": np.array([len(experts)], np.int32),
                    "layer": np.array([layer], np.int32),
                    "tokens": np.array([len(at)], np.int32),
                    "decode": np.zeros(1, np.bool_),
                    "rows": np.array([[first, last]], np.int64),
                }
            )
