"""The least time that a trace can take on a machine, for a policy that knows the future.

The steps are cut into windows. In each window compute does its work one thing after the other. When
the gate of a window's first step has chosen, the slots hold only a limited number of experts,
arrived or under way. Every other expert that the window needs crosses the link afterwards and is
computed afterwards. There are at least as many of these loads as a clairvoyant cache needs that
begins with the best content. So a window lasts as long as the busiest of compute, link and disk,
and the run lasts at least as long as the windows of any cut together.

The best cut is sought among windows that start at every unit (a token) and end up to 32 units
later, the same windows in strides of 8 units, and longer windows that double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moesim.limits.loads import Shares, domains, remembered, windows
from moesim.machine.costs import Costs, Sizes, costs_of
from moesim.machine.profile import Machine
from moesim.workload.steps import Workload

REACH = 32
FINE = (1, 8)  # units between the starts of windows that reach up to REACH times as far
# Of longer traces only the doubling windows: the fine ones cost three times as much.
FINE_UNITS = 1 << 17
BLOCK_STEPS = 1 << 18  # steps whose costs are in memory together

Counts = NDArray[np.int64]


class _Work(NamedTuple):
    """The compute of each of some stretches of the run: windows or single steps."""

    compute_ns: Counts
    requests: Counts
    prompts: Counts  # steps of prompts
    longest_ns: Counts  # of the stretch's experts

    def merged(self, n: int) -> _Work:
        """The work of stretches that join ``n`` of these stretches each."""
        at = np.arange(0, len(self.requests), n)
        return _Work(
            np.add.reduceat(self.compute_ns, at),
            np.add.reduceat(self.requests, at),
            np.add.reduceat(self.prompts, at),
            np.maximum.reduceat(self.longest_ns, at),
        )

    def growing(self, count: int) -> _Work:
        """[n, count]: from each of these, windows of 1, 2, ... ``count`` of them."""
        ahead = (sliding_window_view(np.pad(c, (0, count - 1)), count) for c in self)
        compute_ns, requests, prompts, longest_ns = ahead
        return _Work(
            np.cumsum(compute_ns, axis=1),
            np.cumsum(requests, axis=1),
            np.cumsum(prompts, axis=1),
            np.maximum.accumulate(longest_ns, axis=1),
        )


@remembered
def min_time_ns(
    workload: Workload,
    machine: Machine,
    sizes: Sizes,
    slots: int,
    scope: str,
    *,
    buffers: int = 0,
    cold: bool = False,
    decoding: bool = False,
    shares: Shares = None,
) -> int:
    """The least ns in which ``machine`` can serve ``workload`` from caches that start empty.

    The limit holds for every policy that computes what the router chose, at one precision.
    ``buffers`` is the number of staging buffers that may keep prefetched experts in addition to the
    ``slots`` a layer (with ``shares``: to ``shares[l]`` of layer l); 0 where prefetches go to
    slots. Where the machine has CPU workers, any expert may be computed there. Of a link that
    writes victims back only the way in is counted. ``cold``: the caches start empty, and the link
    idle, with every sequence. ``decoding``: only the time spent on decoded tokens is counted, not
    that of their prompts.
    """
    if cold:
        return sum(
            min_time_ns(
                part,
                machine,
                sizes,
                slots,
                scope,
                buffers=buffers,
                decoding=decoding,
                shares=shares,
            )
            for part in workload.sequences()
        )
    from moesim.limits.belady_kernel import longest_path

    costs = costs_of(workload, machine, sizes, predicting=False)
    domain_of, capacity = domains(workload, slots, scope, shares)
    host = costs.host_experts + int(capacity.sum())
    loads = net_loads(workload, tuple(capacity.tolist()))
    reads = net_loads(workload, (host,)) if costs.read_ns else loads
    caches = domain_of, capacity
    work, single = _units(workload, costs, caches, host, buffers, decoding=decoding)
    bounds = []
    for (stride, count), copies, fetched in zip(_scales(workload), loads, reads, strict=True):
        window = work.merged(stride).growing(count)
        leads = costs.gate_ns(slice(None, None, stride * workload.meta.n_layers))[:, None]
        least = _bound(window, leads, copies, fetched, costs, buffers, cold=True)
        if decoding:
            least[window.prompts > 0] = 0
        bounds.append(least.ravel())
    strides, counts = np.array(_scales(workload), np.int64).reshape(-1, 2).T
    return int(longest_path(single, np.concatenate(bounds), strides, counts))


def _scales(workload: Workload) -> list[tuple[int, int]]:
    """(stride, count): windows of 1, 2, ... count strides from each multiple of the stride."""
    n_units = -(-workload.n_steps // workload.meta.n_layers)
    scales = [(stride, REACH) for stride in FINE] if n_units <= FINE_UNITS else []
    stride = FINE[-1] * REACH if scales else 1
    while stride < n_units:
        stride *= 2
        scales.append((stride, 1))
    return scales


@remembered
def net_loads(workload: Workload, capacity: tuple[int, ...]) -> list[NDArray[np.int32]]:
    """The fewest loads of each window, an array [starts, count] for each of the scales.

    ``capacity`` is the slots of each layer, or of the one cache of all layers. Windows at the start
    of the run begin with empty caches, the others with the best content.
    """
    n_layers = workload.meta.n_layers
    shared = len(capacity) == 1
    domain_of = np.zeros(workload.n_steps, np.int32) if shared else workload.layer
    held = np.array(capacity, np.int64)
    found = []
    for stride, count in _scales(workload):
        counted = windows(workload, domain_of, held, stride * n_layers, count=count)
        net = counted[:, :, 0] - counted[:, :, 1]
        net[0] = counted[0, :, 0]
        found.append(net.astype(np.int32))
    return found


def _units(
    workload: Workload,
    costs: Costs,
    caches: tuple[NDArray[np.int32], Counts],
    host: int,
    buffers: int,
    *,
    decoding: bool,
) -> tuple[_Work, Counts]:
    """The work of each unit (as many steps as the model has layers), and the least time of the
    unit's single steps together, which is longer where a prompt's step is wider than its cache.
    ``caches`` are as `domains` gives them."""
    domain_of, capacity = caches
    unit = workload.meta.n_layers
    block = unit * max(1, BLOCK_STEPS // unit)
    parts, sums = [], []
    for first in range(0, workload.n_steps, block):
        offsets = workload.offsets[first : first + block + 1]
        at, width = offsets[:-1] - offsets[0], np.diff(offsets)
        expert_ns = costs.compute_ns(slice(offsets[0], offsets[-1]))
        leads = costs.gate_ns(slice(first, first + len(at)))
        steps = _Work(
            leads + np.add.reduceat(expert_ns, at),
            width,
            (~workload.decode[first : first + len(at)]).astype(np.int64),
            np.maximum.reduceat(expert_ns, at),
        )
        here = capacity[domain_of[first : first + len(at)]]
        loads, reads = np.maximum(width - here, 0), np.maximum(width - host, 0)
        if first == 0:
            loads[0] = reads[0] = width[0]
        least = _bound(steps, leads, loads, reads, costs, buffers, cold=first == 0)
        if decoding:
            least[steps.prompts > 0] = 0
        sums.append(np.add.reduceat(least, np.arange(0, len(at), unit)))
        parts.append(steps.merged(unit))
        workload.release()
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Work(*columns), np.concatenate(sums)


def _bound(
    work: _Work,
    leads: Counts,
    loads: NDArray[np.integer],
    reads: NDArray[np.integer],
    costs: Costs,
    buffers: int,
    *,
    cold: bool,
) -> Counts:
    """The least ns of each window on its own. ``leads`` is the time until the window's first gate
    has chosen; ``cold``: the first windows are the start of the run, before any prefetch."""
    kept = np.full(loads.shape, buffers)
    if cold:
        kept[0] = 0
    around = leads + costs.expert_ns.min()  # what arrives last is computed afterwards
    copies, fetched = np.maximum(loads - kept, 0), np.maximum(reads - kept, 0)

    def rest_ns(on_cpu: Counts) -> Counts:
        """Ns of the busiest of compute, link and disk, when the CPU computes ``on_cpu`` of the
        requests."""
        copied = np.maximum(copies - on_cpu, 0)
        busy = _link_ns(copied, costs)
        if costs.read_ns:
            busy = np.maximum(busy, _disk_ns(np.maximum(fetched - on_cpu, 0), costs))
        busy = np.where(copied > 0, busy + around, 0)
        return np.maximum(work.compute_ns - on_cpu * work.longest_ns, busy)

    if not costs.cpu_workers:
        return rest_ns(np.zeros_like(copies))
    fastest_ns = int(costs.cpu_ns.min())
    return _balanced(rest_ns, lambda n: -(-n * fastest_ns // costs.cpu_workers), work.requests)


def _link_ns(copies: Counts, costs: Costs) -> Counts:
    """From the start of the first of ``copies`` until the last has arrived."""
    bus_ns = (costs.n_pieces - 1) * costs.piece_ns + costs.last_piece_ns
    if costs.back_to_back:  # even the first may have waited for its stream
        return copies * bus_ns
    streams = costs.streams * (2 if costs.chunked else 1)
    rounds = -(-copies // streams)
    return np.maximum(costs.latency_ns + copies * bus_ns, rounds * (costs.latency_ns + bus_ns))


def _disk_ns(reads: Counts, costs: Costs) -> Counts:
    """The same for copies that are read from the disk first, one at a time."""
    return np.where(reads > 0, reads * costs.read_ns + _link_ns(np.ones_like(reads), costs), 0)


def _balanced(
    rest_ns: Callable[[Counts], Counts], cpu_ns: Callable[[Counts], Counts], requests: Counts
) -> Counts:
    """The least over every share of the requests that CPU workers might take.

    With a larger share on the CPU the rest never takes longer. So the least is at the first share
    for which the CPU takes at least as long as the rest, or at the share before that one.
    """
    low, high = np.zeros_like(requests), requests.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        enough = cpu_ns(middle) >= rest_ns(middle)
        high = np.where(enough, middle, high)
        low = np.where(enough, low, np.minimum(middle + 1, high))
    before = np.maximum(low - 1, 0)
    return np.minimum(
        np.maximum(cpu_ns(low), rest_ns(low)), np.maximum(cpu_ns(before), rest_ns(before))
    )
