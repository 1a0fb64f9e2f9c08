"""What no policy can beat: the fewest loads a cache of a given size needs for a trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.workload import Workload


def min_loads(workload: Workload, slots: int, scope: str) -> int:
    """The fewest copies over the link that serve every step, knowing the future.

    Belady over whole steps with bypass: after each step a domain keeps, of its cache and the
    step's experts, the ``slots`` that are used soonest (DESIGN: optimal for steps as atomic
    events). ``slots`` is per layer; scope "global" pools them.
    """
    per_layer = scope == "layer"
    n_experts, n_layers = workload.meta.n_experts, workload.meta.n_layers
    capacity = slots if per_layer else slots * n_layers
    domains = workload.layer if per_layer else np.zeros_like(workload.layer)
    count = _compiled(_count_loads)(
        workload.keys,
        workload.next_use,
        workload.offsets,
        domains,
        n_layers if per_layer else 1,
        capacity,
        n_layers * n_experts,
    )
    return int(count)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    compiled: Callable[..., Any] = numba.njit(cache=True)(function)
    return compiled


def _count_loads(
    keys: NDArray[np.int32],
    next_use: NDArray[np.int64],
    offsets: NDArray[np.int64],
    domains: NDArray[np.int32],
    n_domains: int,
    capacity: int,
    n_keys: int,
) -> int:
    due = np.zeros(n_keys, np.int64)
    cached = np.zeros(n_keys, np.bool_)
    # Room for a full cache and a step that wants every key.
    members = np.zeros((n_domains, min(capacity, n_keys) + n_keys), np.int32)
    count = np.zeros(n_domains, np.int64)
    loads = 0
    for step in range(len(offsets) - 1):
        domain = domains[step]
        for i in range(offsets[step], offsets[step + 1]):
            key = keys[i]
            due[key] = next_use[i]
            if not cached[key]:
                cached[key] = True
                loads += 1
                members[domain, count[domain]] = key
                count[domain] += 1
        while count[domain] > capacity:
            farthest = 0
            for j in range(1, count[domain]):
                if due[members[domain, j]] > due[members[domain, farthest]]:
                    farthest = j
            cached[members[domain, farthest]] = False
            count[domain] -= 1
            members[domain, farthest] = members[domain, count[domain]]
    return loads
