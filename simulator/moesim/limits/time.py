"""The least time a trace can take on a machine, whatever is fetched when, knowing the future.

Cut a run at any step boundaries. Between two of them compute does its work one thing after the
other; and every expert that the window's steps need and that had not set out before crosses the
link whole, and is then computed. However well the slots were filled beforehand, those are at
least the loads of a clairvoyant cache that began with the best content. So a window lasts as
long as the busier of compute, link and disk, and the run as long as any windows' sum. Each window
of 16 * 2^i steps counts for itself or for its two halves, whichever is more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.costs import Costs, Sizes, costs_of
from moesim.limits.loads import domains, remembered, windows
from moesim.profile import Machine
from moesim.workload import Workload

UNIT = 16  # steps of the shortest window but one: single steps are counted without a cache
LONGEST = 1 << 18  # steps; of longer windows only the whole run still adds anything
BLOCK = UNIT << 14  # steps whose costs are in memory together

Counts = NDArray[np.int64]


class _Windows(NamedTuple):
    """What compute has to do in each of some windows."""

    compute_ns: Counts
    requests: Counts
    shortest_ns: Counts  # of the window's experts
    longest_ns: Counts
    cpu_ns: Counts  # of its experts the one that a CPU worker computes soonest

    def merged(self, n: int) -> _Windows:
        """Windows of ``n`` of these each."""
        at = np.arange(0, len(self.requests), n)
        return _Windows(
            np.add.reduceat(self.compute_ns, at),
            np.add.reduceat(self.requests, at),
            np.minimum.reduceat(self.shortest_ns, at),
            np.maximum.reduceat(self.longest_ns, at),
            np.minimum.reduceat(self.cpu_ns, at),
        )


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

    No policy beats it that computes what the router chose, at one precision. ``buffers``: how
    many staging buffers may keep prefetched experts beside the ``slots`` a layer; 0 where
    prefetches go to slots. Where the machine has CPU workers, any expert may be computed there.
    Of a link that writes victims back only the way in is counted.
    """
    costs = costs_of(workload, machine, sizes, predicting=False)
    _, n_domains, capacity = domains(workload, slots, scope)
    host = costs.host_experts + n_domains * capacity
    loads = net_loads(workload, capacity, scope == "layer")
    reads = net_loads(workload, host, False) if costs.read_ns else None
    work, least = _units(workload, costs, capacity, host, buffers)
    for level, count in enumerate(loads):
        if level:
            work = work.merged(2)
            least = np.add.reduceat(least, np.arange(0, len(least), 2))
        if len(count):
            missing = np.zeros_like(count) if reads is None else reads[level]
            least = np.maximum(least, _bound(work, count, missing, costs, buffers, cold=True))
    return int(least[0])


@remembered
def net_loads(workload: Workload, capacity: int, per_layer: bool) -> list[NDArray[np.int32]]:
    """The fewest loads of each window of UNIT, 2 UNIT, ... steps, up to one window of them all.

    The first window begins with empty caches, the others with the best content there is. Empty
    arrays stand for lengths that are not worth counting.
    """
    layers = workload.meta.n_layers
    domain_of = workload.layer if per_layer else np.zeros(workload.n_steps, np.int32)
    found = []
    window = UNIT
    while True:
        whole = window >= workload.n_steps
        if whole or window <= LONGEST:
            count = windows(workload, domain_of, layers if per_layer else 1, capacity, window)
            net = (count[:, 0] - count[:, 1]).astype(np.int32)
            net[0] = count[0, 0]
            found.append(net)
        else:
            found.append(np.empty(0, np.int32))
        if whole:
            return found
        window *= 2


def _units(
    workload: Workload, costs: Costs, capacity: int, host: int, buffers: int
) -> tuple[_Windows, Counts]:
    """The windows of UNIT steps, and the least time of each as a sum over its single steps."""
    parts, sums = [], []
    for first in range(0, workload.n_steps, BLOCK):
        offsets = workload.offsets[first : min(first + BLOCK, workload.n_steps) + 1]
        demand = slice(offsets[0], offsets[-1])
        at = offsets[:-1] - offsets[0]
        expert_ns, width = costs.expert_ns[demand], np.diff(offsets)
        steps = _Windows(
            costs.layer_ns[first : first + len(at)] + np.add.reduceat(expert_ns, at),
            width,
            np.minimum.reduceat(expert_ns, at),
            np.maximum.reduceat(expert_ns, at),
            np.minimum.reduceat(costs.cpu_ns[demand], at),
        )
        loads, reads = np.maximum(width - capacity, 0), np.maximum(width - host, 0)
        if first == 0:
            loads[0] = reads[0] = width[0]
        if not costs.read_ns:
            reads[:] = 0
        least = _bound(steps, loads, reads, costs, buffers, cold=first == 0)
        sums.append(np.add.reduceat(least, np.arange(0, len(at), UNIT)))
        parts.append(steps.merged(UNIT))
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Windows(*columns), np.concatenate(sums)


def _bound(
    work: _Windows,
    loads: NDArray[np.integer],
    reads: NDArray[np.integer],
    costs: Costs,
    buffers: int,
    *,
    cold: bool,
) -> Counts:
    """The least ns of each window on its own. ``cold``: the first is the start of the run, when
    nothing can have been prefetched and nothing is until its first gate has spoken."""
    copies, fetched = loads.astype(np.int64), reads.astype(np.int64)
    kept = np.full(len(copies), buffers)
    delay = np.zeros(len(copies), np.int64)
    if cold:
        kept[0], delay[0] = 0, costs.layer_ns[0]
    copies, fetched = np.maximum(copies - kept, 0), np.maximum(fetched - kept, 0)

    def beside(on_cpu: Counts) -> Counts:
        """Compute, link and disk, when ``on_cpu`` of the requests are computed elsewhere."""
        moved = (
            delay
            + work.shortest_ns
            + np.maximum(
                _link_ns(np.maximum(copies - on_cpu, 0), costs),
                _disk_ns(np.maximum(fetched - on_cpu, 0), costs),
            )
        )
        moved[copies <= on_cpu] = 0
        return np.maximum(work.compute_ns - on_cpu * work.longest_ns, moved)

    if not costs.cpu_workers:
        return beside(np.zeros_like(copies))
    return _balanced(beside, work, costs.cpu_workers)


def _link_ns(copies: Counts, costs: Costs) -> Counts:
    """From the moment the first of ``copies`` starts until the last has arrived."""
    bus_ns = (costs.n_pieces - 1) * costs.piece_ns + costs.last_piece_ns
    streams = costs.streams * (2 if costs.chunked else 1)
    rounds = -(-copies // streams)
    return np.maximum(costs.latency_ns + copies * bus_ns, rounds * (costs.latency_ns + bus_ns))


def _disk_ns(reads: Counts, costs: Costs) -> Counts:
    """The same, of copies that are read from the disk first, one at a time."""
    one = np.ones_like(reads)
    return np.where(reads > 0, reads * costs.read_ns + _link_ns(one, costs), 0)


def _balanced(beside: Callable[[Counts], Counts], work: _Windows, workers: int) -> Counts:
    """The least over every share of the requests that CPU workers might take.

    More on the CPU is never more for the rest, so the least lies where the two are equal: the
    first share at which the CPU takes as long as the rest, or the one before it.
    """

    def cpu_ns(share: Counts) -> Counts:
        return -(-share * work.cpu_ns // workers)

    low, high = np.zeros_like(work.requests), work.requests.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        enough = cpu_ns(middle) >= beside(middle)
        high = np.where(enough, middle, high)
        low = np.where(enough, low, np.minimum(middle + 1, high))
    before = np.maximum(low - 1, 0)
    return np.minimum(
        np.maximum(cpu_ns(low), beside(low)), np.maximum(cpu_ns(before), beside(before))
    )
