"""The replay's cache of experts in host memory before a disk: the most recently used records."""

from __future__ import annotations

from moesim.engines.replay_state import Clocks
from moesim.machine.costs import Costs


def host_has(costs: Costs, clocks: Clocks, key: int, low: int) -> bool:
    """Whether the host's cache has the record; it does afterwards, if there is room for it."""
    record = key + low * len(clocks.arrival)
    n_bytes = costs.low_bytes if low else costs.expert_bytes
    hit = bool(clocks.host_newer[record] >= 0)
    if hit:
        host_drop(costs, clocks, record)
    if n_bytes > costs.host_bytes:
        return hit
    ring = len(clocks.host_newer) - 1
    newest = clocks.host_older[ring]
    clocks.host_older[record] = newest
    clocks.host_newer[record] = ring
    clocks.host_newer[newest] = record
    clocks.host_older[ring] = record
    clocks.host_bytes[0] += n_bytes
    while clocks.host_bytes[0] > costs.host_bytes:
        host_drop(costs, clocks, clocks.host_newer[ring])
    return hit


def host_drop(costs: Costs, clocks: Clocks, record: int) -> None:
    """``record`` leaves the host's cache."""
    older, newer = clocks.host_older[record], clocks.host_newer[record]
    clocks.host_newer[older] = newer
    clocks.host_older[newer] = older
    clocks.host_newer[record] = -1
    low = record >= len(clocks.arrival)
    clocks.host_bytes[0] -= costs.low_bytes if low else costs.expert_bytes
