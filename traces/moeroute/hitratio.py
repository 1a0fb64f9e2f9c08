"""Hit ratios of per-layer expert caches by size, for LRU and the two clairvoyant policies.

All K experts of a token at a layer are one step: hits are those resident when it begins, and
nothing the step uses is evicted by it. Caches start empty and live on between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeroute.schema import TraceError
from moeroute.statistics import Floats, Routing

_NEVER = np.int64(1) << 40


@dataclass(frozen=True)
class HitRatios:
    """Share of the experts used that were resident, for caches of `sizes` experts a layer."""

    sizes: tuple[int, ...]
    lru: Floats  # [sizes]
    belady: Floats  # [sizes] evicts the farthest next use; what is used is always kept
    belady_bypass: Floats  # [sizes] may decline to keep what it has just loaded


def hit_ratios(routing: Routing, sizes: Sequence[int] | None = None) -> HitRatios:
    """Hit ratios for `sizes` (default: K .. E-1, thinned to ten).

    Raises TraceError for a size below K: a step would not fit.
    """
    if sizes is None:
        sizes = default_sizes(routing)
    if small := [size for size in sizes if size < routing.top_k]:
        raise TraceError(
            f"a cache of {small[0]} experts a layer cannot hold a step's {routing.top_k}"
        )
    next_use = _next_use(routing)
    return HitRatios(
        sizes=tuple(sizes),
        lru=_lru(routing, sizes),
        belady=_belady(routing, next_use, sizes, bypass=False),
        belady_bypass=_belady(routing, next_use, sizes, bypass=True),
    )


def default_sizes(routing: Routing) -> list[int]:
    """At most ten sizes from K to E-1 (K alone where K = E)."""
    last = max(routing.top_k, routing.n_experts - 1)
    count = min(10, last - routing.top_k + 1)
    return sorted({round(size) for size in np.linspace(routing.top_k, last, count)})


def _lru(routing: Routing, sizes: Sequence[int]) -> Floats:
    """One pass for all sizes: a cache of C holds the C experts used last (a stack).

    Inside a step recency is router order reversed, so the heaviest expert ends most recent.
    """
    n_layers, top_k = routing.n_layers, routing.top_k
    used_at = np.full((n_layers, routing.n_experts), -1, dtype=np.int64)
    recency = np.arange(top_k, 0, -1)
    distances = np.zeros(routing.n_experts + 1, dtype=np.int64)
    for step, (experts, valid) in enumerate(zip(routing.experts, routing.valid, strict=True)):
        own = np.take_along_axis(used_at, experts, axis=1)  # [L, K]
        distance = (used_at[:, None, :] > own[:, :, None]).sum(axis=2)
        distance[own < 0] = routing.n_experts  # never used: a miss at any size
        if valid.all():
            distances += np.bincount(distance.ravel(), minlength=len(distances))
            np.put_along_axis(used_at, experts, step * top_k + recency, axis=1)
        else:
            distances += np.bincount(distance[valid].ravel(), minlength=len(distances))
            layers = np.flatnonzero(valid)[:, None]
            used_at[layers, experts[valid]] = step * top_k + recency
    hits = np.cumsum(distances)[np.asarray(sizes, dtype=np.int64) - 1]
    return hits / (int(routing.valid.sum()) * top_k)


def _belady(
    routing: Routing, next_use: NDArray[np.int64], sizes: Sequence[int], *, bypass: bool
) -> Floats:
    """All sizes side by side. Of the cache and the step's own experts, keep the C needed soonest;
    without bypass the step's own come first. Which of those needed in the same step does not
    matter: they meet again in it.
    """
    n_layers, n_experts = routing.n_layers, routing.n_experts
    key = np.arange(n_experts)
    needed = np.full((n_layers, n_experts), _NEVER * n_experts) + key  # step * E + e: no ties
    absent = np.iinfo(np.int64).max
    held = np.zeros((len(sizes), n_layers, n_experts), dtype=np.bool_)
    last_kept = np.asarray(sizes, dtype=np.int64).reshape(-1, 1, 1) - 1
    hits = np.zeros(len(sizes), dtype=np.int64)
    layers = np.arange(n_layers)[:, None]
    for experts, soonest, valid in zip(routing.experts, next_use, routing.valid, strict=True):
        at = (layers, experts) if valid.all() else (layers[valid], experts[valid])
        hits += held[:, *at].sum(axis=(1, 2))
        held[:, *at] = True
        needed[at] = soonest[valid] * n_experts + at[1]
        urgency = needed
        if not bypass:
            urgency = needed.copy()
            urgency[at] = at[1] - n_experts  # before all others
        score = np.where(held, urgency, absent)
        limit = np.take_along_axis(np.sort(score, axis=2), last_kept, axis=2)
        held &= score <= limit
    return hits / (int(routing.valid.sum()) * routing.top_k)


def _next_use(routing: Routing) -> NDArray[np.int64]:
    """The step at which each expert used is next used at its layer, or _NEVER: [T, L, K]."""
    shape = routing.experts.shape
    step, layer, _ = (axis.ravel() for axis in np.indices(shape, sparse=False))
    key = layer * routing.n_experts + routing.experts.ravel()
    key[~np.repeat(routing.valid.ravel(), shape[2])] = -1
    order = np.argsort(key, kind="stable")
    again = key[order[1:]] == key[order[:-1]]
    result = np.full(key.shape, _NEVER)
    result[order[:-1][again]] = step[order[1:][again]]
    return result.reshape(shape)
