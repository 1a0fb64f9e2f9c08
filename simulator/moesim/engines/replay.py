"""The compiled twin of `moesim.engines.in_simpy`: the same machine as a loop over its few clocks.

Plain functions over arrays and integers, compiled with numba together with the state machine and
the policy. There is no event heap: what comes next is the end of the bus's piece, a copy whose
bytes become ready, or compute itself. Event for event it gives SimPy's timeline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import machine
from moepolicy.kinds import COMPUTE, HIT, LATE, MISS, SKIP, SUBSTITUTE
from moepolicy.machine import begin, consume, end, finish, start
from moepolicy.state import (
    BACKLOG,
    DEMAND,
    EVICTED,
    FIRST,
    IS_LOW,
    PREFETCH,
    RESIDENT,
    STAND_INS,
    STATUS,
    UNUSED,
    Cache,
)
from moepolicy.steps import Step
from numpy.typing import NDArray

from moesim.engines.in_simpy import COMPUTE_LANE, CPU_LANE, DISK_LANE, LINK_LANE
from moesim.engines.replay_state import (
    ARRIVED,
    BUS_COPY,
    BUS_UNTIL,
    COPY_IS_LOW,
    DECODE_NS,
    DISK_FREE_AT,
    FOLLOWED_AT,
    HOST_BYTES,
    KEY,
    LINK_BUSY_NS,
    N_COPIES,
    N_SEGMENTS,
    NEVER,
    NEWER,
    NOW,
    NUMBER,
    OLDER,
    PIECES,
    PROMPT_NS,
    READY_AT,
    STALL_NS,
    STARTED,
    WANTED_NOW,
    Link,
    Work,
    step_at,
)
from moesim.machine.costs import Costs

DONE = -1  # an expert's outcome once it is computed


def unreachable(cache: Cache, costs: Costs, link: Link) -> frozenset[Any]:
    """The functions that a run with these features will not come to."""
    without: set[Any] = set()
    if not len(link.segments):
        without.add(_draw)
    if not costs.cpu_workers:
        without.add(_run_on_cpu)
    if not costs.read_ns:
        without.add(_host_has)
    if not cache.prefetching:
        without.add(_want)
    if not cache.choosing:
        without.add(_runs)
    return machine.unreachable(cache) | without


def replay(
    cache: Cache,
    policy: Any,
    work: Work,
    costs: Costs,
    link: Link,
    steps: tuple[int, int],
    logits: NDArray[np.float32],
    predicted: NDArray[np.float32],
    outcome: NDArray[np.int8],
) -> None:
    """Steps first to one before last. ``logits`` and ``predicted`` hold a row for each of them,
    or have none where no policy looks; ``outcome`` is scratch of n_experts entries."""
    clock = link.clock
    for number in range(steps[0], steps[1]):
        began = clock[NOW]
        until_gate = costs.layer_ns[costs.tokens[number]]
        if costs.begins_pass[number]:
            until_gate += costs.pass_ns
        _advance(cache, policy, costs, link, began + until_gate)
        layer = work.layer[number]
        _draw(link, COMPUTE_LANE, 0, began, clock[NOW], -1 - layer, 1)
        backlog = cache.board[BACKLOG]
        step = step_at(work, number, number - steps[0], logits, predicted, backlog)
        _expert_step(cache, policy, costs, link, step, work.offsets[number], outcome)
        if work.decode[number]:
            clock[DECODE_NS] += clock[NOW] - began
        else:
            clock[PROMPT_NS] += clock[NOW] - began


def _expert_step(
    cache: Cache,
    policy: Any,
    costs: Costs,
    link: Link,
    step: Step,
    at: int,
    outcome: NDArray[np.int8],
) -> None:
    """Decide, compute what is here in router order, then what arrives as it arrives."""
    clock = link.clock
    begin(cache, policy, step, outcome)
    n = len(step.experts)
    joins_at = _run_on_cpu(costs, link, step, at, outcome)
    remaining = n
    for rank in range(n):
        if outcome[rank] == LATE:
            _want(link, step.experts[rank])
        if outcome[rank] == COMPUTE or outcome[rank] == SKIP:
            remaining -= 1
    hits = 0  # the ranks among which all hits are computed
    waking_ns = 0
    # One place for time to pass in, as compiled code has all that can happen then in each.
    while remaining > 0 or joins_at > clock[NOW]:
        began = clock[NOW]
        while hits < n and outcome[hits] != HIT:
            hits += 1
        rank = hits if hits < n else _first_ready(cache, link, step, outcome)
        runs = -1
        if rank >= 0:
            runs = step.experts[rank]
            until = began + waking_ns + costs.expert_ns[costs.routed[at + rank]]
            if cache.choosing:
                runs = _runs(cache, runs, rank, outcome)
                if cache.keys[runs, IS_LOW]:
                    until = began + waking_ns + costs.low_expert_ns[costs.routed[at + rank]]
        else:
            until = NEVER if remaining > 0 else joins_at
        _advance(cache, policy, costs, link, until)
        if rank < 0:
            clock[STALL_NS] += clock[NOW] - began
            waking_ns = costs.arrival_ns
        else:
            clock[STALL_NS] += waking_ns
            _draw(link, COMPUTE_LANE, 0, began + waking_ns, clock[NOW], runs, 1)
            waking_ns = 0
            consume(cache, step.experts[rank])
            outcome[rank] = DONE
            remaining -= 1
    end(cache, policy)


def _runs(cache: Cache, key: int, rank: int, outcome: NDArray[np.int8]) -> int:
    """What computes for the step's ``rank``-th expert, ``key``: itself, or its stand-in."""
    return int(cache.scratch[STAND_INS, rank]) if outcome[rank] == SUBSTITUTE else key


def _run_on_cpu(costs: Costs, link: Link, step: Step, at: int, outcome: NDArray[np.int8]) -> int:
    """Share the step's CPU experts among the workers; returns when the last is done."""
    free_at = link.cpu_free_at
    joins_at = 0
    for rank in range(len(step.experts)):
        if outcome[rank] == COMPUTE:
            if joins_at == 0:
                free_at[:] = link.clock[NOW]
            worker = 0
            for other in range(1, len(free_at)):
                if free_at[other] < free_at[worker]:
                    worker = other
            began = free_at[worker]
            free_at[worker] = began + costs.cpu_ns[costs.routed[at + rank]]
            joins_at = max(joins_at, free_at[worker])
            _draw(link, CPU_LANE, worker, began, free_at[worker], step.experts[rank], 1)
    return joins_at


def _first_ready(cache: Cache, link: Link, step: Step, outcome: NDArray[np.int8]) -> int:
    """After the hits: the first rank that has a stand-in, then that of the awaited expert which
    arrived first; -1 while none has."""
    first = -1
    for rank in range(len(step.experts)):
        if outcome[rank] == SUBSTITUTE:
            return rank
        if outcome[rank] == LATE or outcome[rank] == MISS:
            key = step.experts[rank]
            if cache.keys[key, STATUS] == RESIDENT and (
                first < 0 or link.arrival[key] < link.arrival[step.experts[first]]
            ):
                first = rank
    return first


def _advance(cache: Cache, policy: Any, costs: Costs, link: Link, until: int) -> None:
    """Let the link work while compute is busy until then, or waits for an arrival if that is
    NEVER. What ends at ``until`` itself is complete on return, and dispatched on only after the
    decisions of that instant."""
    clock = link.clock
    arrived = clock[ARRIVED]
    while until > clock[NOW]:
        if clock[N_COPIES] or cache.board[BACKLOG]:
            _dispatch(cache, policy, costs, link)
        upcoming = min(until, _next_event(link))
        if upcoming == NEVER:
            raise RuntimeError("the simulated machine is stuck: nothing will arrive")
        clock[NOW] = upcoming
        _complete(cache, policy, costs, link)
        if until == NEVER and clock[ARRIVED] > arrived:
            return


def _next_event(link: Link) -> int:
    """When the bus ends its piece or, if it is idle, the next copy's bytes become ready."""
    upcoming = int(link.clock[BUS_UNTIL])
    if upcoming == NEVER and link.clock[N_COPIES]:
        for stream in range(len(link.copies)):
            if link.copies[stream, KEY] >= 0:
                upcoming = min(upcoming, link.copies[stream, READY_AT])
    return upcoming


def _complete(cache: Cache, policy: Any, costs: Costs, link: Link) -> None:
    """End the bus's piece if its time has come."""
    clock = link.clock
    if clock[BUS_UNTIL] > clock[NOW]:
        return
    clock[BUS_UNTIL] = NEVER
    copy = link.copies[clock[BUS_COPY]]
    copy[PIECES] -= 1
    if copy[PIECES] == 0:
        key = copy[KEY]
        copy[KEY] = -1
        clock[N_COPIES] -= 1
        clock[ARRIVED] += 1
        link.arrival[key] = clock[ARRIVED]
        finish(cache, policy, key)
        if costs.back_to_back and not _nothing_queued(cache):
            copy[FOLLOWED_AT] = clock[NOW]


def _nothing_queued(cache: Cache) -> bool:
    return bool(cache.board[FIRST + DEMAND] < 0 and cache.board[FIRST + PREFETCH] < 0)


def _dispatch(cache: Cache, policy: Any, costs: Costs, link: Link) -> None:
    stream = _free_stream(cache, costs, link)
    while stream >= 0:
        key = start(cache, policy)
        if key < 0:
            break
        _start_copy(cache, costs, link, key, stream)
        stream = _free_stream(cache, costs, link)
    if link.clock[BUS_UNTIL] == NEVER:
        _grant_bus(costs, link)


def _free_stream(cache: Cache, costs: Costs, link: Link) -> int:
    """A stream for what would be copied next; -1 where nothing is queued or none is free."""
    first = 0
    if cache.board[FIRST + DEMAND] < 0:
        if cache.board[FIRST + PREFETCH] < 0:
            return -1
        first = costs.streams if costs.chunked else 0
    for stream in range(first, first + costs.streams):
        if link.copies[stream, KEY] < 0:
            return stream
    return -1


def _start_copy(cache: Cache, costs: Costs, link: Link, key: int, stream: int) -> None:
    clock, copy = link.clock, link.copies[stream]
    demand = 1 - cache.keys[key, UNUSED]
    low = cache.keys[key, IS_LOW] if cache.lowering else 0
    ready_at = clock[NOW]
    if not costs.back_to_back or copy[FOLLOWED_AT] != clock[NOW]:
        ready_at += costs.latency_ns
    if costs.read_ns and not _host_has(costs, link, key, low):
        begins = max(clock[NOW], clock[DISK_FREE_AT])
        clock[DISK_FREE_AT] = begins + (costs.low_read_ns if low else costs.read_ns)
        ready_at = clock[DISK_FREE_AT] + costs.latency_ns
        _draw(link, DISK_LANE, 0, begins, clock[DISK_FREE_AT], key, demand)
    clock[STARTED] += 1
    clock[N_COPIES] += 1
    copy[KEY] = key
    copy[NUMBER] = clock[STARTED]
    copy[WANTED_NOW] = demand
    copy[READY_AT] = ready_at
    twice = costs.write_back and cache.board[EVICTED] >= 0
    n_pieces = costs.low_pieces if low else costs.n_pieces
    copy[PIECES] = n_pieces * 2 if twice else n_pieces
    copy[COPY_IS_LOW] = low


def _host_has(costs: Costs, link: Link, key: int, low: int) -> bool:
    """Whether the host's cache has the record; it does afterwards, if there is room for it."""
    clock, host = link.clock, link.host
    record = key + low * len(link.arrival)
    n_bytes = costs.low_bytes if low else costs.expert_bytes
    hit = bool(host[record, NEWER] >= 0)
    if hit:
        _host_drop(costs, link, record)
    if n_bytes > costs.host_bytes:
        return hit
    ring = len(host) - 1
    newest = host[ring, OLDER]
    host[record, OLDER] = newest
    host[record, NEWER] = ring
    host[newest, NEWER] = record
    host[ring, OLDER] = record
    clock[HOST_BYTES] += n_bytes
    while clock[HOST_BYTES] > costs.host_bytes:
        _host_drop(costs, link, host[ring, NEWER])
    return hit


def _host_drop(costs: Costs, link: Link, record: int) -> None:
    older, newer = link.host[record, OLDER], link.host[record, NEWER]
    link.host[older, NEWER] = newer
    link.host[newer, OLDER] = older
    link.host[record, NEWER] = -1
    low = record >= len(link.arrival)
    link.clock[HOST_BYTES] -= costs.low_bytes if low else costs.expert_bytes


def _want(link: Link, key: int) -> None:
    """A guess under way turned out to be right: its bytes go with the demanded ones now."""
    for stream in range(len(link.copies)):
        if link.copies[stream, KEY] == key:
            link.copies[stream, WANTED_NOW] = 1


def _grant_bus(costs: Costs, link: Link) -> None:
    """The next piece: of demand before prefetch, of what started first."""
    clock = link.clock
    chosen = -1
    for stream in range(len(link.copies)):
        copy = link.copies[stream]
        if copy[KEY] >= 0 and copy[READY_AT] <= clock[NOW]:
            if chosen < 0:
                chosen = stream
            else:
                best = link.copies[chosen]
                if copy[WANTED_NOW] > best[WANTED_NOW] or (
                    copy[WANTED_NOW] == best[WANTED_NOW] and copy[NUMBER] < best[NUMBER]
                ):
                    chosen = stream
    if chosen < 0:
        return
    copy = link.copies[chosen]
    low = copy[COPY_IS_LOW]
    took = costs.low_last_piece_ns if low else costs.last_piece_ns
    if (copy[PIECES] - 1) % (costs.low_pieces if low else costs.n_pieces) != 0:
        took = costs.piece_ns
    clock[BUS_UNTIL] = clock[NOW] + took
    clock[BUS_COPY] = chosen
    clock[LINK_BUSY_NS] += took
    _draw(link, LINK_LANE, chosen, clock[NOW], clock[BUS_UNTIL], copy[KEY], copy[WANTED_NOW])


def _draw(link: Link, lane: int, index: int, begins: int, ends: int, key: int, demand: int) -> None:
    """Add a segment to the timeline, if one is kept."""
    if len(link.segments):
        n = link.clock[N_SEGMENTS]
        if n == len(link.segments):
            raise IndexError("the timeline is full")
        row = link.segments[n]
        row[0] = lane
        row[1] = index
        row[2] = begins
        row[3] = ends
        row[4] = key
        row[5] = demand
        link.clock[N_SEGMENTS] = n + 1
