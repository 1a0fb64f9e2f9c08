"""A static placement: which experts to keep on the device, by use or by what a policy ends with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    Context,
    ExpertCache,
    PolicySpec,
    Step,
    demand_order,
)
from moeroute import Trace, TraceError
from moeroute.schema import DECODE, NO_EXPERT
from numpy.typing import NDArray

MOST_USED = "most-used"
_KNOWN = frozenset({"counts"})  # what a policy may require of a placement's context and steps


def most_used(trace: Trace, slots: int, *, scope: str) -> list[list[int]]:
    """The experts used most, by layer, the most used first; equal uses: the lowest expert.

    `slots` a layer, or, with scope "global", as many on average, whichever layers they are of.
    Raises TraceError for slots that cannot be.
    """
    counts = trace.expert_counts()
    n_layers, n_experts = counts.shape
    _check_slots(slots, n_experts)
    if scope == "global":
        best = np.argsort(-counts.ravel(), kind="stable")[: slots * n_layers]
        return _by_layer(best, n_layers, n_experts)
    order = np.argsort(-counts, axis=1, kind="stable")[:, :slots]
    return [row.tolist() for row in order]


def resident_after(trace: Trace, policy: PolicySpec, slots: int, *, scope: str) -> list[list[int]]:
    """The experts that a cache under `policy` holds after the trace, by layer and by expert.

    Loads take no time and nothing is prefetched. Raises TraceError where the policy needs
    predictions, logits or the future.
    """
    if lacking := sorted(policy.requires - _KNOWN):
        raise TraceError(
            f"policy '{policy.label}' needs {', '.join(lacking)}: a placement is made without; "
            "take a policy that evicts by use, such as lru, lfu or lfu-aging"
        )
    meta = trace.meta
    _check_slots(slots, meta.n_experts)
    context = Context(
        n_layers=meta.n_layers,
        n_experts=meta.n_experts,
        top_k=meta.top_k,
        slots=slots,
        scope=scope,
        counts=trace.expert_counts() if "counts" in policy.requires else None,
    )
    cache = ExpertCache(context, policy.build(context), name=policy.label)
    for step in _steps(trace):
        cache.begin(step)
        while (copy := cache.start()) is not None:
            cache.finish(copy.key)
        for key in step.experts.tolist():
            cache.consume(key)
        cache.end()
    held = [key for key in range(meta.n_layers * meta.n_experts) if cache.slot_of(key) >= 0]
    return _by_layer(np.array(held), meta.n_layers, meta.n_experts)


def _check_slots(slots: int, most: int) -> None:
    if not 1 <= slots <= most:
        raise TraceError(f"slots {slots}: must be 1 to {most}")


def _by_layer(keys: NDArray[Any], n_layers: int, n_experts: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(n_layers)]
    for key in keys.tolist():
        found[key // n_experts].append(key % n_experts)
    return found


def _steps(trace: Trace) -> Iterator[Step]:
    """The trace's steps: a layer of a forward pass each."""
    names = ["sequence", "position", "phase", "layer", "experts"]
    names += [name for name in ("weights", "pass_id") if trace.has(name)]
    columns = trace.arrays(*names)
    order, starts = _passes(columns)
    number = 0
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        rows = order[first:last]
        layers = columns["layer"][rows]
        for layer in np.unique(layers).tolist():
            at = rows[layers == layer]
            ids = columns["experts"][at].astype(np.int32)
            weights = columns["weights"][at] if "weights" in columns else np.ones(ids.shape)
            experts, mass = demand_order(ids, weights)
            real = experts != NO_EXPERT
            keys = experts[real] + np.int32(layer * trace.meta.n_experts)
            yield Step(number, layer, keys, mass[real], NO_LOGITS, NO_PREDICTIONS, tokens=len(at))
            number += 1


def _passes(columns: dict[str, NDArray[Any]]) -> tuple[NDArray[np.intp], list[int]]:
    """Rows in the order of time, and where forward passes begin."""
    if "pass_id" in columns:
        order = np.argsort(columns["pass_id"], kind="stable")
        of = columns["pass_id"][order]
        return order, np.flatnonzero(np.append(True, of[1:] != of[:-1])).tolist()
    sequence, phase = columns["sequence"], columns["phase"]
    position = columns["position"]
    new = (sequence[1:] != sequence[:-1]) | (phase[1:] != phase[:-1])
    new |= (position[1:] != position[:-1]) & (phase[1:] == DECODE)
    return np.arange(len(sequence)), np.flatnonzero(np.append(True, new)).tolist()
