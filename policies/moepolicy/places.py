"""What the state machine does to its arrays: slots, staging buffers, queues, and notes of it all.

No decision is taken here; `moepolicy.machine` decides.
"""

from __future__ import annotations

from moepolicy.kinds import USELESS
from moepolicy.policy import Policy
from moepolicy.state import (
    ABSENT,
    NOTHING,
    QUEUED,
    RESIDENT,
    Cache,
)


def note(cache: Cache, kind: int, key: int, other: int) -> None:
    """Count a decision and, where events are kept, write it down. IndexError when they are full."""
    cache.counters[kind] += 1
    if cache.events.shape[0]:
        i = cache.n_events[0]
        if i == cache.events.shape[0]:
            raise IndexError("the event buffer is full")
        cache.events[i, 0] = kind
        cache.events[i, 1] = cache.step[0]
        cache.events[i, 2] = key
        cache.events[i, 3] = other
        cache.n_events[0] = i + 1


def domain_of(cache: Cache, key: int) -> int:
    """The cache that ``key`` belongs to: of its layer, or the shared one."""
    return key // cache.n_experts if cache.per_layer else 0


def gather_candidates(cache: Cache, domain: int) -> int:
    """Write the domain's keys that may go (resident, not pinned), ascending; returns how many."""
    n = 0
    for i in range(cache.n_held[domain]):
        key = cache.held[domain, i]
        # Written in any case and counted if it may go: no branch that depends on the data.
        cache.candidates[n] = key
        n += (cache.status[key] == RESIDENT) & (cache.pinned[key] == 0)
    return n


def hold(cache: Cache, domain: int, key: int) -> None:
    """Add ``key`` to a domain's keys, which ascend."""
    held = cache.held[domain]
    i = cache.n_held[domain]
    while i > 0 and held[i - 1] > key:
        held[i] = held[i - 1]
        i -= 1
    held[i] = key
    cache.n_held[domain] += 1


def exchange(cache: Cache, domain: int, leaving: int, arriving: int) -> None:
    """Put a key in the place of another among a domain's keys, which go on ascending."""
    held = cache.held[domain]
    last = cache.n_held[domain] - 1
    i = 0
    while held[i] != leaving:
        i += 1
    while i < last and held[i + 1] < arriving:
        held[i] = held[i + 1]
        i += 1
    while i > 0 and held[i - 1] > arriving:
        held[i] = held[i - 1]
        i -= 1
    held[i] = arriving


def remove(cache: Cache, area: int, key: int) -> None:
    """Take ``key`` from a domain's or the staging buffers' keys, keeping the order."""
    held = cache.held[area]
    last = cache.n_held[area] - 1
    i = 0
    while held[i] != key:
        i += 1
    for j in range(i, last):
        held[j] = held[j + 1]
    cache.n_held[area] -= 1


def pop_free(cache: Cache, area: int) -> int:
    """An unused slot of a domain or of staging, of which there is one."""
    cache.n_free[area] -= 1
    return int(cache.free[area, cache.n_free[area]])


def push_free(cache: Cache, area: int, slot: int) -> None:
    """``slot`` of a domain or of staging is unused from now on."""
    cache.free[area, cache.n_free[area]] = slot
    cache.n_free[area] += 1


def stage(cache: Cache, key: int) -> None:
    """Add ``key`` to those in staging, as the newest."""
    cache.held[cache.staging, cache.n_held[cache.staging]] = key
    cache.n_held[cache.staging] += 1
    cache.staged[key] = 1


def unstage(cache: Cache, key: int) -> None:
    """Take ``key`` out of staging."""
    remove(cache, cache.staging, key)
    cache.staged[key] = 0


def join_queue(cache: Cache, key: int, queue: int) -> None:
    """Queue ``key`` as the last of a queue."""
    last = cache.last[queue]
    cache.status[key] = QUEUED
    cache.queue[key] = queue
    cache.backlog[0] += 1
    cache.previous[key] = last
    cache.next[key] = -1
    if last >= 0:
        cache.next[last] = key
    else:
        cache.first[queue] = key
    cache.last[queue] = key


def leave_queue(cache: Cache, key: int) -> None:
    """Take ``key`` out of its queue, wherever it stands."""
    queue = cache.queue[key]
    cache.backlog[0] -= 1
    if cache.previous[key] >= 0:
        cache.next[cache.previous[key]] = cache.next[key]
    else:
        cache.first[queue] = cache.next[key]
    if cache.next[key] >= 0:
        cache.previous[cache.next[key]] = cache.previous[key]
    else:
        cache.last[queue] = cache.previous[key]
    cache.status[key] = ABSENT


def leave_device(cache: Cache, policy: Policy, key: int) -> None:
    """``key`` is gone from the slot it had."""
    cache.status[key] = ABSENT
    cache.place[key] = -1
    cache.is_low[key] = 0
    if cache.unused[key]:
        cache.unused[key] = 0
        note(cache, USELESS, key, NOTHING)
    policy.on_evict(key)
