"""Hit ratios of per-layer expert caches by size, for LRU and the two clairvoyant policies.

All K experts of a token at a layer are one step. Hits are the experts that are resident when the
step begins. A step never evicts an expert that the step uses. Caches start empty and keep their
contents from one sequence to the next.
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

    Raises TraceError for a size below K, in which a step would not fit, and for one above E.
    """
    if sizes is None:
        sizes = default_sizes(routing)
    if large := [size for size in sizes if size > routing.n_experts]:
        raise TraceError(
            f"a cache of {large[0]} experts a layer: a layer has no more than {routing.n_experts}"
        )
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
    for step, (experts, there) in enumerate(zip(routing.experts, routing.present, strict=True)):
        own = np.take_along_axis(used_at, np.maximum(experts, 0), axis=1)  # [L, K]
        distance = (used_at[:, None, :] > own[:, :, None]).sum(axis=2)
        distance[own < 0] = routing.n_experts  # never used: a miss at any size
        if there.all():
            distances += np.bincount(distance.ravel(), minlength=len(distances))
            np.put_along_axis(used_at, experts, step * top_k + recency, axis=1)
        else:
            distances += np.bincount(distance[there], minlength=len(distances))
            layers, order = np.nonzero(there)
            used_at[layers, experts[there]] = step * top_k + recency[order]
    hits = np.cumsum(distances)[np.asarray(sizes, dtype=np.int64) - 1]
    return hits / int(routing.present.sum())


def _belady(
    routing: Routing, next_use: NDArray[np.int64], sizes: Sequence[int], *, bypass: bool
) -> Floats:
    """All sizes at once. Of the cache and the step's own experts, the C needed soonest are kept;
    without bypass the step's own experts are kept first. Ties between experts that the same step
    needs do not matter: all of them meet in that step."""
    n_layers, n_experts = routing.n_layers, routing.n_experts
    key = np.arange(n_experts)
    needed = np.full((n_layers, n_experts), _NEVER * n_experts) + key  # step * E + e: no ties
    absent = np.iinfo(np.int64).max
    held = np.zeros((len(sizes), n_layers, n_experts), dtype=np.bool_)
    last_kept = np.asarray(sizes, dtype=np.int64).reshape(-1, 1, 1) - 1
    hits = np.zeros(len(sizes), dtype=np.int64)
    layers = np.arange(n_layers)[:, None]
    for experts, soonest, there in zip(routing.experts, next_use, routing.present, strict=True):
        whole = there.all()
        at = (layers, experts) if whole else (np.nonzero(there)[0], experts[there])
        hits += held[:, *at].reshape(len(sizes), -1).sum(axis=1)
        held[:, *at] = True
        needed[at] = (soonest if whole else soonest[there]) * n_experts + at[1]
        urgency = needed
        if not bypass:
            urgency = needed.copy()
            urgency[at] = at[1] - n_experts  # before all others
        score = np.where(held, urgency, absent)
        limit = np.take_along_axis(np.sort(score, axis=2), last_kept, axis=2)
        held &= score <= limit
    return hits / int(routing.present.sum())


def _next_use(routing: Routing) -> NDArray[np.int64]:
    """The step at which each expert used is next used at its layer, or _NEVER: [T, L, K]."""
    shape = routing.experts.shape
    step, layer, _ = (axis.ravel() for axis in np.indices(shape, sparse=False))
    key = layer * routing.n_experts + routing.experts.ravel()
    key[~routing.present.ravel()] = -1
    order = np.argsort(key, kind="stable")
    again = key[order[1:]] == key[order[:-1]]
    result = np.full(key.shape, _NEVER)
    result[order[:-1][again]] = step[order[1:][again]]
    return result.reshape(shape)
