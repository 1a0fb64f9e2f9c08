"""Sharing slots out among layers by dynamic programming, from what each layer would gain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def planned_slots(hits: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """int64[n_layers]: the shares of ``total`` slots with the most hits in all.

    ``hits`` [n_layers, n_experts + 1] is what a layer's cache of 0, 1, ... n_experts slots would
    hit; it need not be concave. Among shares with equally many hits those with the least sum of
    squares, the nearest to equal, are chosen. This is the knapsack of AdapMoE's planner (arXiv
    2408.10284, section 4.4; `src/dp.py` of its code), which minimises expected loads in the same
    way. ValueError where ``total`` is not 0 to n_layers * n_experts.
    """
    n_layers, n_experts = hits.shape[0], hits.shape[1] - 1
    if not 0 <= total <= n_layers * n_experts:
        raise ValueError(f"{n_layers} layers of {n_experts} experts cannot share {total} slots")
    best = np.full(total + 1, -np.inf)  # with the layers so far and 0, 1, ... total slots
    best[0] = 0.0
    squares = np.zeros(total + 1)
    chosen = np.zeros((n_layers, total + 1), np.int64)
    for layer in range(n_layers):
        before, spread = best, squares
        best, squares = np.full(total + 1, -np.inf), np.zeros(total + 1)
        for n in range(min(n_experts, total) + 1):
            gained = before[: total + 1 - n] + hits[layer, n]
            spreads = spread[: total + 1 - n] + n * n
            better = (gained > best[n:]) | ((gained == best[n:]) & (spreads < squares[n:]))
            best[n:][better] = gained[better]
            squares[n:][better] = spreads[better]
            chosen[layer, n:][better] = n
    shares = np.zeros(n_layers, np.int64)
    left = total
    for layer in reversed(range(n_layers)):
        shares[layer] = chosen[layer, left]
        left -= int(shares[layer])
    return shares


def frequent_hits(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[n_layers, n_experts + 1]: the share of a layer's uses that its 0, 1, ... n_experts
    most used experts have in ``counts`` [n_layers, n_experts]. All experts of a layer that was
    never counted are taken to be used alike.
    """
    uses = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1)
    ordered = np.sort(uses, axis=1)[:, ::-1]
    # Sums of whole numbers, divided once: equal shares stay equal to the bit.
    sums = np.cumsum(np.pad(ordered, ((0, 0), (1, 0))), axis=1)
    return np.asarray(sums / sums[:, -1:], np.float64)
