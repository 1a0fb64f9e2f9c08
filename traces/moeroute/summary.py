"""All statistics of a trace as one tidy table, for commands and reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeroute.hitratio import hit_ratios
from moeroute.schema import prediction_column
from moeroute.statistics import (
    Routing,
    gate_weights,
    locality,
    popularity,
    read_routing,
    recall,
)
from moeroute.trace import Trace


class Statistic(NamedTuple):
    """One number about a trace, and the number of its token-shuffled copy where that differs."""

    name: str
    parameter: str  # what it depends on: "lag=1", "slots=4", "ahead=1 fetched=2"; may be empty
    value: float  # NaN where the trace is too short to tell
    shuffled: float | None = None  # what popularity alone would give


def summarize(
    trace: Trace, *, sizes: Sequence[int] | None = None, seed: int = 0
) -> list[Statistic]:
    """The statistics of `trace`; hit ratios for caches of `sizes` experts a layer.

    `seed` seeds the shuffled copy. Gate weights and recall are left out where the trace has no
    weights or predictions. Raises TraceError for a size below K or above E.
    """
    routing = read_routing(trace)
    shuffled = routing.shuffled(seed)
    return [
        *_localities(routing, shuffled),
        *_popularities(routing),
        *_gate_weights(trace),
        *_recalls(trace),
        *_hit_ratios(routing, shuffled, sizes),
    ]


def _localities(routing: Routing, shuffled: Routing) -> Iterator[Statistic]:
    near, chance = locality(routing), locality(shuffled)
    for i, lag in enumerate(near.lags):
        yield Statistic("locality", f"lag={lag}", float(near.mean[i]), float(chance.mean[i]))
    for layer in (_arg(near.by_layer[:, 0], "min"), _arg(near.by_layer[:, 0], "max")):
        value, other = near.by_layer[layer, 0], chance.by_layer[layer, 0]
        yield Statistic("locality", f"lag=1 layer={layer}", float(value), float(other))
    for name, value, other in (
        ("some_expert_repeats", near.any_by_layer, chance.any_by_layer),
        ("top1_repeats", near.top1_by_layer, chance.top1_by_layer),
    ):
        yield Statistic(name, "lag=1", float(value.mean()), float(other.mean()))


def _popularities(routing: Routing) -> Iterator[Statistic]:
    use = popularity(routing)
    yield Statistic("hottest_share", "mean of layers", float(use.hottest.mean()))
    yield Statistic("hottest_share", "largest of layers", float(use.hottest.max()))
    yield Statistic("use_entropy", "mean of layers", float(use.entropy.mean()))


def _gate_weights(trace: Trace) -> Iterator[Statistic]:
    if not trace.has("weights"):
        return
    gate = gate_weights(trace)
    yield Statistic("top1_weight", "mean", gate.mean_top1)
    for limit, share in gate.share_at_least.items():
        yield Statistic("top1_weight_share", f"at least {limit}", share)


def _recalls(trace: Trace) -> Iterator[Statistic]:
    if not trace.has(prediction_column(1)):
        return
    found = recall(trace)
    for name, table in (("recall", found.mean), ("top1_recall", found.top1_mean)):
        for (j, i), value in np.ndenumerate(table):
            yield Statistic(name, f"ahead={j + 1} fetched={found.counts[i]}", float(value))


def _hit_ratios(
    routing: Routing, shuffled: Routing, sizes: Sequence[int] | None
) -> Iterator[Statistic]:
    found, chance = hit_ratios(routing, sizes), hit_ratios(shuffled, sizes)
    for name in ("lru", "belady", "belady_bypass"):
        for i, size in enumerate(found.sizes):
            value, other = getattr(found, name)[i], getattr(chance, name)[i]
            yield Statistic(f"hit_ratio_{name}", f"slots={size}", float(value), float(other))


def _arg(values: NDArray[np.float64], which: str) -> int:
    """The layer with the least or most locality; 0 if none has any."""
    if np.isnan(values).all():
        return 0
    return int(np.nanargmin(values) if which == "min" else np.nanargmax(values))
