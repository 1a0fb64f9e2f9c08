"""What the state machine does to its arrays: slots, staging buffers, queues, and notes of it all.

No decision is taken here; `moepolicy.machine` decides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import USELESS
from moepolicy.policy import Policy
from moepolicy.state import (
    ABSENT,
    BACKLOG,
    CANDIDATES,
    COUNTERS,
    FIRST,
    HELD,
    IS_LOW,
    LAST,
    N_EVENTS,
    N_FREE,
    N_HELD,
    NEXT,
    NOTHING,
    PINNED,
    PLACE,
    PREVIOUS,
    QUEUE,
    QUEUED,
    RESIDENT,
    STAGED,
    STATUS,
    STEP,
    UNUSED,
    Cache,
)


def note(cache: Cache, kind: int, key: int, other: int) -> None:
    cache.board[COUNTERS + kind] += 1
    if cache.events.shape[0]:
        i = cache.board[N_EVENTS]
        if i == cache.events.shape[0]:
            raise IndexError("the event buffer is full")
        cache.events[i, 0] = kind
        cache.events[i, 1] = cache.board[STEP]
        cache.events[i, 2] = key
        cache.events[i, 3] = other
        cache.board[N_EVENTS] = i + 1


def domain_of(cache: Cache, key: int) -> int:
    return key // cache.n_experts if cache.per_layer else 0


def gather_candidates(cache: Cache, domain: int) -> int:
    """Write the domain's keys that may go (resident, not pinned), ascending; returns how many."""
    n = 0
    held = cache.domains[domain]
    for i in range(HELD, HELD + held[N_HELD]):
        key = held[i]
        # Written in any case and counted if it may go: no branch that depends on the data.
        cache.scratch[CANDIDATES, n] = key
        n += (cache.keys[key, STATUS] == RESIDENT) & (cache.keys[key, PINNED] == 0)
    return n


def hold(held: NDArray[np.int64], key: int) -> None:
    """Add ``key`` to a domain's keys, which ascend."""
    i = HELD + held[N_HELD]
    while i > HELD and held[i - 1] > key:
        held[i] = held[i - 1]
        i -= 1
    held[i] = key
    held[N_HELD] += 1


def exchange(held: NDArray[np.int64], leaving: int, arriving: int) -> None:
    """Put a key in the place of another among a domain's keys, which go on ascending."""
    last = HELD + held[N_HELD] - 1
    i = HELD
    while held[i] != leaving:
        i += 1
    while i < last and held[i + 1] < arriving:
        held[i] = held[i + 1]
        i += 1
    while i > HELD and held[i - 1] > arriving:
        held[i] = held[i - 1]
        i -= 1
    held[i] = arriving


def remove(held: NDArray[np.int64], key: int) -> None:
    """Take ``key`` from a domain's or the staging buffers' keys, keeping the order."""
    last = HELD + held[N_HELD] - 1
    i = HELD
    while held[i] != key:
        i += 1
    for j in range(i, last):
        held[j] = held[j + 1]
    held[N_HELD] -= 1


def pop_free(held: NDArray[np.int64], capacity: int) -> int:
    """An unused slot of a domain or of staging, of which there is one."""
    held[N_FREE] -= 1
    return int(held[HELD + capacity + held[N_FREE]])


def free_slot(held: NDArray[np.int64], capacity: int, slot: int) -> None:
    """``slot`` of a domain is unused from now on."""
    held[HELD + capacity + held[N_FREE]] = slot
    held[N_FREE] += 1


def stage(cache: Cache, key: int) -> None:
    cache.staging[HELD + cache.staging[N_HELD]] = key
    cache.staging[N_HELD] += 1
    cache.keys[key, STAGED] = 1


def unstage(cache: Cache, key: int) -> None:
    remove(cache.staging, key)
    cache.keys[key, STAGED] = 0


def free_buffer(cache: Cache, slot: int) -> None:
    cache.staging[HELD + cache.staging_buffers + cache.staging[N_FREE]] = slot
    cache.staging[N_FREE] += 1


def join_queue(cache: Cache, key: int, queue: int) -> None:
    row = cache.keys[key]
    last = cache.board[LAST + queue]
    row[STATUS] = QUEUED
    row[QUEUE] = queue
    cache.board[BACKLOG] += 1
    row[PREVIOUS] = last
    row[NEXT] = -1
    if last >= 0:
        cache.keys[last, NEXT] = key
    else:
        cache.board[FIRST + queue] = key
    cache.board[LAST + queue] = key


def leave_queue(cache: Cache, key: int) -> None:
    row = cache.keys[key]
    queue = row[QUEUE]
    cache.board[BACKLOG] -= 1
    if row[PREVIOUS] >= 0:
        cache.keys[row[PREVIOUS], NEXT] = row[NEXT]
    else:
        cache.board[FIRST + queue] = row[NEXT]
    if row[NEXT] >= 0:
        cache.keys[row[NEXT], PREVIOUS] = row[PREVIOUS]
    else:
        cache.board[LAST + queue] = row[PREVIOUS]
    row[STATUS] = ABSENT


def leave_device(cache: Cache, policy: Policy, key: int) -> None:
    """``key`` is gone from the slot it had."""
    row = cache.keys[key]
    row[STATUS] = ABSENT
    row[PLACE] = -1
    row[IS_LOW] = 0
    if row[UNUSED]:
        row[UNUSED] = 0
        note(cache, USELESS, key, NOTHING)
    policy.on_evict(key)
