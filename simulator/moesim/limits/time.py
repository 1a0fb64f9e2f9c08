"""The least time a trace can take on a machine, whatever is fetched when, knowing the future.

Cut the run at any step boundaries. Between two of them compute does its work one thing after the
other, and every copy that the window's steps need, and that had not started before it, crosses
the link whole: however well the slots were filled beforehand, at least as many as a clairvoyant
cache with the best initial content loads. So each window lasts at least as long as the busier of
the two, and the run at least the sum over any windows. Here each window of 2^i steps counts for
itself or for its two halves, whichever gives more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs import Costs, Sizes, costs_of
from moesim.limits.loads import domains, remembered, windows
from moesim.profile import Machine
from moesim.workload import Workload

# Longer windows gain nothing: what the free initial content spares is a sliver of their loads.
LONGEST_WINDOW = 1 << 18

Counts = NDArray[np.int64]


def min_time_ns(
    workload: Workload,
    machine: Machine,
    sizes: Sizes,
    slots: int,
    scope: str,
    *,
    buffers: int = 0,
) -> int:
    """The least ns in which ``machine`` can serve ``workload`` from caches that start empty.

    No policy beats it that computes what the router chose at one precision. ``buffers`` is how
    many staging buffers the policies may keep prefetched experts in, beside the ``slots`` a
    layer (0: prefetches go to slots). Where the machine has CPU workers, any expert may be
    computed there. Of a link that writes victims back, the way back is not counted: a policy
    need not evict.
    """
    costs = costs_of(workload, machine, sizes, predicting=False)
    n_domains, capacity = domains(workload, slots, scope)[1:]
    ends = np.arange(1, workload.n_steps + 1)
    best = _bound(workload, costs, ends, _single_steps(workload, costs, slots, scope), buffers)
    window = 1
    host = costs.host_experts + n_domains * capacity
    while len(best) > 1:
        window *= 2
        ends = np.minimum(np.arange(1, (len(best) + 3) // 2) * window, workload.n_steps)
        halves = np.add.reduceat(best, np.arange(0, len(best), 2))
        best = halves
        if window > LONGEST_WINDOW and len(best) > 1:
            continue
        loads = _loads(workload, slots, scope, window)
        reads = _loads(workload, host, "host", window) if costs.read_ns else np.zeros_like(loads)
        best = np.maximum(halves, _bound(workload, costs, ends, (loads, reads), buffers))
    return int(best[0])
