"""What a trace says about caching and prefetching: locality, popularity, gate weights, recall.

Hit ratios by cache size are in `moeroute.hitratio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeroute.schema import DECODE, NO_EXPERT, PHASES, TraceError, TraceMeta, prediction_column
from moeroute.trace import Trace

LAGS = (1, 2, 4, 8, 16, 32)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
    """The experts of the tokens of one phase, as one stream of T steps a layer.

    Streams differ in length where rows are missing; ``valid`` is False past the end of a stream.
    """

    experts: NDArray[np.int64]  # [T, L, K] by weight descending; -1 where a token chose fewer
    token: NDArray[np.uint64]  # [T, L] sequence << 32 | position
    valid: NDArray[np.bool_]  # [T, L]
    n_experts: int

    @property
    def top_k(self) -> int:
        """Experts that a token chooses in a layer."""
        return int(self.experts.shape[2])

    @property
    def n_layers(self) -> int:
        """Layers with experts."""
        return int(self.experts.shape[1])

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """[T, L, K]: where there is a choice of an expert."""
        there: NDArray[np.bool_] = self.valid[:, :, None] & (self.experts >= 0)
        return there

    def shuffled(self, seed: int) -> Routing:
        """The steps in random order: the popularity stays, the locality does not."""
        rng = np.random.default_rng(seed)
        experts = self.experts.copy()
        for layer in range(self.n_layers):
            n = int(self.valid[:, layer].sum())
            experts[:n, layer] = experts[rng.permutation(n), layer]
        return Routing(experts, self.token, self.valid, self.n_experts)


def read_routing(trace: Trace, phase: int | None = None) -> Routing:
    """The routing of the tokens of `phase`; default: decode, or prompt if there is no decode.

    Raises TraceError if the trace has no token of `phase`, and for rows out of order.
    """
    trace.check_order()
    column = trace.arrays("sequence", "position", "phase", "layer", "experts")
    if phase is None:
        phase = DECODE if (column["phase"] == DECODE).any() else 0
    rows = np.flatnonzero(column["phase"] == phase)
    if not len(rows):
        raise TraceError(f"{trace.path}: column phase: there are no {PHASES[phase]} tokens")
    layer = column["layer"][rows]
    order = np.argsort(layer, kind="stable")
    counts = np.bincount(layer, minlength=trace.meta.n_layers)
    step = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, at = rows[order], (step, layer[order])

    shape = (int(counts.max()), trace.meta.n_layers)
    experts = np.zeros((*shape, trace.meta.top_k), dtype=np.int64)
    token = np.zeros(shape, dtype=np.uint64)
    valid = np.zeros(shape, dtype=np.bool_)
    chosen = column["experts"][rows].astype(np.int64)
    if trace.meta.variable_top_k:
        chosen[chosen == NO_EXPERT] = -1
    experts[at] = chosen
    token[at] = _token(column["sequence"][rows], column["position"][rows])
    valid[at] = True
    return Routing(experts, token, valid, trace.meta.n_experts)


@dataclass(frozen=True)
class Locality:
    """How often a token's experts are those of an earlier token of its sequence, same layer."""

    lags: tuple[int, ...]  # tokens back
    by_layer: Floats  # [L, lags] P(an expert was in that token's set); NaN where no such pair is
    any_by_layer: Floats  # [L] at the first lag: at least one of the K was
    top1_by_layer: Floats  # [L] at the first lag: the heaviest is that token's heaviest

    @property
    def mean(self) -> Floats:
        """[lags], the mean over layers."""
        return _mean(self.by_layer, axis=0)


def locality(routing: Routing, lags: Sequence[int] = LAGS) -> Locality:
    """Locality at each of `lags` (ascending, 1 or more)."""
    by_layer = np.full((routing.n_layers, len(lags)), np.nan)
    at_first = np.full((routing.n_layers, 2), np.nan)
    for layer in range(routing.n_layers):
        valid = routing.valid[:, layer]
        token, experts = routing.token[valid, layer], routing.experts[valid, layer]
        for i, lag in enumerate(lags):
            earlier, later = _pairs(token, lag)
            if not len(later):
                continue
            same = experts[later][:, :, None] == experts[earlier][:, None, :]  # [pairs, K, K]
            there = experts[later] >= 0
            repeats = same.any(axis=2) & there
            by_layer[layer, i] = repeats.sum() / there.sum()
            if i == 0:
                at_first[layer] = repeats.any(axis=1).mean(), same[:, 0, 0].mean()
    return Locality(tuple(lags), by_layer, at_first[:, 0], at_first[:, 1])


def _pairs(token: NDArray[np.uint64], lag: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices (earlier, later) of tokens of one sequence that are `lag` positions apart."""
    has_past = (token & np.uint64(0xFFFFFFFF)) >= lag
    later = np.flatnonzero(has_past)
    wanted = token[later] - np.uint64(lag)
    earlier = np.searchsorted(token, wanted)
    found = token[earlier] == wanted
    return earlier[found], later[found]


@dataclass(frozen=True)
class Popularity:
    """How unevenly a layer's experts are used."""

    shares: Floats  # [L, E] of the layer's uses
    hottest: Floats  # [L] share of the expert used most
    entropy: Floats  # [L] of the shares, over that of even use: 1 is even


def popularity(routing: Routing) -> Popularity:
    """Use of the experts, layer by layer."""
    shares = np.zeros((routing.n_layers, routing.n_experts))
    for layer in range(routing.n_layers):
        used = routing.experts[:, layer][routing.present[:, layer]]
        shares[layer] = np.bincount(used, minlength=routing.n_experts)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    even = np.log(routing.n_experts) if routing.n_experts > 1 else 1.0
    return Popularity(shares, shares.max(axis=1), -(shares * logs).sum(axis=1) / even)


@dataclass(frozen=True)
class GateWeights:
    """How much of a token the heaviest expert carries: its share of the K weights' sum."""

    mean_top1: float
    share_at_least: dict[float, float]  # threshold -> share of (token, layer) rows


def gate_weights(trace: Trace, thresholds: Sequence[float] = (0.8, 0.9)) -> GateWeights:
    """Gate weights over all decode rows. Raises TraceError if the trace has no weights."""
    trace.require("weights", "the gate weight statistic")
    column = trace.arrays("weights", "phase")
    weights = column["weights"]
    if (column["phase"] == DECODE).any():
        weights = weights[column["phase"] == DECODE]
    top1 = weights[:, 0].astype(np.float64) / weights.sum(axis=1, dtype=np.float64)
    return GateWeights(
        mean_top1=float(top1.mean()),
        share_at_least={limit: float((top1 >= limit).mean()) for limit in thresholds},
    )


@dataclass(frozen=True)
class Recall:
    """Share of a layer's used experts that are among the n likeliest of a prediction."""

    counts: tuple[int, ...]  # n
    by_layer: Floats  # [horizon, counts, L]; NaN where a layer has no prediction
    top1_by_layer: Floats  # [horizon, counts, L] of the heaviest expert alone

    @property
    def mean(self) -> Floats:
        """[horizon, counts], the mean over the layers that have predictions."""
        return _mean(self.by_layer, axis=2)

    @property
    def top1_mean(self) -> Floats:
        """[horizon, counts], likewise for the heaviest expert."""
        return _mean(self.top1_by_layer, axis=2)


def recall(trace: Trace, counts: Sequence[int] | None = None) -> Recall:
    """Recall of the trace's predictions if the `counts` likeliest (default 1..2K) are fetched.

    Decode rows are used, or all rows where the trace has no decode rows. Raises TraceError without
    predictions.
    """
    trace.require(prediction_column(1), "the recall of predictions")
    meta = trace.meta
    if counts is None:
        counts = range(1, min(2 * meta.top_k, meta.n_experts) + 1)
    shape = (meta.horizon, len(counts), meta.n_layers)
    every, first = np.full(shape, np.nan), np.full(shape, np.nan)
    phase = trace.array("phase")
    wanted = phase == DECODE if (phase == DECODE).any() else np.ones(len(phase), dtype=np.bool_)
    for j in range(meta.horizon):
        name = prediction_column(j + 1)
        column = trace.arrays("layer", "experts", name)
        here = wanted & ~np.isnan(column[name][:, 0])
        chosen = column["experts"][here]
        there = chosen != NO_EXPERT if meta.variable_top_k else np.ones_like(chosen, np.bool_)
        rank = _ranks(column[name][here], np.where(there, chosen, 0))
        layer = column["layer"][here]
        total = np.bincount(layer, minlength=meta.n_layers).astype(np.float64)
        total[total == 0] = np.nan
        for i, count in enumerate(counts):
            found = (rank < count) & there
            share = found.sum(axis=1) / there.sum(axis=1)
            every[j, i] = _sum_by(layer, share, meta) / total
            first[j, i] = _sum_by(layer, found[:, 0], meta) / total
    return Recall(tuple(counts), every, first)


def _ranks(logits: NDArray[np.float16], experts: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Rank (0 the likeliest, ties to the lowest expert) each of `experts` has: [n, K]."""
    rank = np.empty(experts.shape, dtype=np.int64)
    columns = np.arange(logits.shape[1])
    for k in range(experts.shape[1]):
        expert = experts[:, k : k + 1].astype(np.int64)
        own = np.take_along_axis(logits, expert, axis=1)
        before = (logits > own) | ((logits == own) & (columns < expert))
        rank[:, k] = before.sum(axis=1)
    return rank


def _sum_by(layer: NDArray[np.uint16], values: NDArray[np.generic], meta: TraceMeta) -> Floats:
    total = np.bincount(layer, weights=values.astype(np.float64), minlength=meta.n_layers)
    return total.astype(np.float64)


def _token(sequence: NDArray[np.uint32], position: NDArray[np.uint32]) -> NDArray[np.uint64]:
    return sequence.astype(np.uint64) << np.uint64(32) | position


def _mean(values: Floats, axis: int) -> Floats:
    """nanmean that is NaN, without a warning, where there is nothing."""
    there = ~np.isnan(values)
    count = there.sum(axis=axis)
    total = np.where(there, values, 0.0).sum(axis=axis)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean
