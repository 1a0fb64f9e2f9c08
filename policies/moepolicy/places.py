"""What the state machine does to its arrays: slots, staging buffers, queues, and notes of it all.

No decision is taken here; `moepolicy.machine` decides.
"""

from __future__ import annotations

from moepolicy.kinds import USELESS
from moepolicy.policy import Policy
from moepolicy.state import (
    ABSENT,
    INDEX,
    NOTHING,
    QUEUED,
    RESIDENT,
    STAYS,
    Cache,
)


def note(cache: Cache, kind: int, key: int, other: int) -> None:
    """Count a decision and, where events are kept, write it down. IndexError when they are full."""
    cache.counters[kind] += 1
    if cache.events.shape[0]:
        write_down(cache, kind, key, other)


def write_down(cache: Cache, kind: int, key: int, other: int) -> None:
    """Add a decision to the events. IndexError when they are full."""
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
    return int(cache.domain[key]) & INDEX


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
    """Add ``key``, which must stay for now, to a domain's keys."""
    if cache.scoring:
        _put(cache, domain, int(cache.n_held[domain]) & INDEX, key)
        cache.n_held[domain] += 1
    else:
        _insert(cache, domain, key)


def exchange(cache: Cache, domain: int, leaving: int, arriving: int) -> None:
    """Put a key, which must stay for now, in the place of another among a domain's keys."""
    if cache.scoring:
        _put(cache, domain, int(cache.at[leaving]) & INDEX, arriving)
    else:
        _exchange_in_order(cache, domain, leaving, arriving)


def remove(cache: Cache, area: int, key: int) -> None:
    """Take ``key`` from a domain's or the staging buffers' keys."""
    if cache.scoring and area != cache.staging:
        last = cache.n_held[area] - 1
        at = cache.at[key]
        moved = int(cache.held[area, last])
        cache.held[area, at] = moved
        cache.standing[area, at] = cache.standing[area, last]
        cache.at[moved] = at
        cache.n_held[area] = last
    else:
        _remove_in_order(cache, area, key)


def may_stay(cache: Cache, key: int) -> None:
    """``key`` is in use: if its domain holds it, its score is out of the way until `may_go`."""
    domain, at = cache.domain[key] & INDEX, cache.at[key] & INDEX
    if cache.held[domain, at] == key:
        cache.standing[domain, at] = STAYS


def may_go(cache: Cache, key: int) -> None:
    """``key`` is neither pinned nor under way: if its domain holds it, its score decides."""
    domain, at = cache.domain[key] & INDEX, cache.at[key] & INDEX
    if cache.held[domain, at] == key:
        cache.standing[domain, at] = cache.scores[key]


def least(cache: Cache, domain: int) -> int:
    """The key of least score that may go, of equal scores the lowest; -1 where none may."""
    standing, held = cache.standing[domain], cache.held[domain]
    n = int(cache.n_held[domain]) & INDEX
    score = STAYS
    for i in range(n):
        score = min(score, standing[i])
    if score == STAYS:
        return -1
    # A pass of its own: neither takes a branch that depends on the data.
    found = STAYS
    for i in range(n):
        found = min(found, held[i] if standing[i] == score else STAYS)
    return int(found) & INDEX


def _put(cache: Cache, domain: int, at: int, key: int) -> None:
    cache.held[domain, at] = key
    cache.standing[domain, at] = STAYS
    cache.at[key] = at


def _insert(cache: Cache, domain: int, key: int) -> None:
    """Add ``key`` to a domain's keys, which ascend."""
    held = cache.held[domain]
    i = cache.n_held[domain]
    while i > 0 and held[i - 1] > key:
        held[i] = held[i - 1]
        i -= 1
    held[i] = key
    cache.n_held[domain] += 1


def _exchange_in_order(cache: Cache, domain: int, leaving: int, arriving: int) -> None:
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


def _remove_in_order(cache: Cache, area: int, key: int) -> None:
    held = cache.held[area]
    last = cache.n_held[area] - 1
    i = 0
    while held[i] != key:
        i += 1
    for j in range(i, last):
        held[j] = held[j + 1]
    cache.n_held[area] -= 1


SCORING = frozenset({may_stay, may_go, least, _put})
NOT_SCORING = frozenset({gather_candidates, _insert, _exchange_in_order})
"""The functions that are only reached where the cache orders by scores, and where it does not."""


def pop_free(cache: Cache, area: int) -> int:
    """An unused slot of a domain or of staging, of which there is one."""
    last = (cache.n_free[area] - 1) & INDEX
    cache.n_free[area] = last
    return int(cache.free[area, last]) & INDEX


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
    queue = cache.queue[key] & INDEX
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
