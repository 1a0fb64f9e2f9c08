"""What the replay's machine is between two moments: its clocks, its copies, the host's cache.

Arrays, because compiled code works on them; `moesim.engines.replay` moves them on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from moepolicy.kinds import HIT, LATE, MISS
from moepolicy.state import Cache
from moepolicy.steps import Step, TokenRows
from numpy.typing import NDArray

from moesim.engines.clock import Segment, SimulatedTime
from moesim.engines.step_kinds import BITS
from moesim.machine.costs import Costs
from moesim.workload.details import Details
from moesim.workload.steps import Workload

NEVER = np.iinfo(np.int64).max
NOT_COUNTED = -1


class Clocks(NamedTuple):
    """Everything of the machine that lasts from step to step. Times are in ns; a single number is
    an array of one entry."""

    # Of the whole: [1].
    now: NDArray[np.int64]
    bus_until: NDArray[np.int64]  # end of the piece on the bus; NEVER when it is idle
    bus_copy: NDArray[np.int64]  # the stream whose piece it is
    disk_free_at: NDArray[np.int64]
    started: NDArray[np.int64]  # copies so far
    arrived: NDArray[np.int64]  # arrivals so far
    n_copies: NDArray[np.int64]  # under way
    n_segments: NDArray[np.int64]
    decode_ns: NDArray[np.int64]  # where the time went
    prompt_ns: NDArray[np.int64]
    stall_ns: NDArray[np.int64]
    link_busy_ns: NDArray[np.int64]
    gates_ns: NDArray[np.int64]

    # Of each stream, the copy under way: [streams].
    copy_key: NDArray[np.int64]  # -1 where the stream is free
    copy_number: NDArray[np.int64]
    copy_is_demand: NDArray[np.int64]
    copy_is_low: NDArray[np.int64]
    ready_at: NDArray[np.int64]
    pieces: NDArray[np.int64]  # of a crossing under way or next, that have not crossed yet
    crossings: NDArray[np.int64]  # not over yet: two where the evicted record is written back
    followed_at: NDArray[np.int64]  # when a copy of the stream last ended that others waited for

    # Of each record, and last the ring's beginning: [records + 1]; the host's cache, by use.
    host_newer: NDArray[np.int64]  # -1 where the record is not there
    host_older: NDArray[np.int64]
    host_bytes: NDArray[np.int64]  # [1] of the records in it

    counted_width: int  # experts of a step whose kind is counted; -1: every step is timed
    kinds: NDArray[np.int64]  # [2, kinds] such steps, of prompts and decoded, without their gates

    arrival: NDArray[np.int64]  # [n_keys] which arrival the key's latest was
    cpu_free_at: NDArray[np.int64]  # [workers]
    segments: NDArray[np.int64]  # [capacity, 6] the timeline; capacity 0: not kept


class ReplaySteps(NamedTuple):
    """The steps of a workload, as compiled code takes them."""

    keys: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    layer: NDArray[np.int32]
    tokens: NDArray[np.int32]
    decode: NDArray[np.bool_]


def new_clocks(
    costs: Costs, n_keys: int, n_segments: int = 0, counted_width: int = NOT_COUNTED
) -> Clocks:
    """An idle machine at time 0; steps of ``counted_width`` experts are counted by kind."""
    n_kinds = 0 if counted_width < 0 else 1 << BITS * counted_width
    n_streams = costs.streams * (2 if costs.chunked else 1)
    n_records = n_keys * (2 if costs.low_bytes else 1)
    host = np.full((2, n_records + 1), -1, np.int64)
    host[:, n_records] = n_records
    return Clocks(
        now=np.zeros(1, np.int64),
        bus_copy=np.zeros(1, np.int64),
        disk_free_at=np.zeros(1, np.int64),
        started=np.zeros(1, np.int64),
        arrived=np.zeros(1, np.int64),
        n_copies=np.zeros(1, np.int64),
        n_segments=np.zeros(1, np.int64),
        decode_ns=np.zeros(1, np.int64),
        prompt_ns=np.zeros(1, np.int64),
        stall_ns=np.zeros(1, np.int64),
        link_busy_ns=np.zeros(1, np.int64),
        gates_ns=np.zeros(1, np.int64),
        host_bytes=np.zeros(1, np.int64),
        copy_key=np.full(n_streams, -1),
        copy_number=np.full(n_streams, -1),
        copy_is_demand=np.full(n_streams, -1),
        copy_is_low=np.full(n_streams, -1),
        ready_at=np.full(n_streams, -1),
        pieces=np.full(n_streams, -1),
        crossings=np.full(n_streams, -1),
        followed_at=np.full(n_streams, -1),
        bus_until=np.full(1, NEVER),
        host_newer=host[0],
        host_older=host[1],
        counted_width=counted_width,
        kinds=np.zeros((2, n_kinds), np.int64),
        arrival=np.zeros(n_keys, np.int64),
        cpu_free_at=np.zeros(costs.cpu_workers, np.int64),
        segments=np.zeros((n_segments, 6), np.int64),
    )


def work_of(workload: Workload) -> ReplaySteps:
    """The arrays of a workload that the replay reads."""
    return ReplaySteps(
        workload.keys,
        workload.weights,
        workload.offsets,
        workload.layer,
        workload.tokens,
        workload.decode,
    )


def clock_of(clocks: Clocks) -> SimulatedTime:
    """Where the time went until now."""
    segments = clocks.segments[: clocks.n_segments[0]].tolist()
    return SimulatedTime(
        total_ns=clocks.now.item(),
        decode_ns=clocks.decode_ns.item(),
        prompt_ns=clocks.prompt_ns.item(),
        stall_ns=clocks.stall_ns.item(),
        link_busy_ns=clocks.link_busy_ns.item(),
        gates_ns=clocks.gates_ns.item(),
        segments=[Segment(*row) for row in segments] if len(clocks.segments) else None,
    )


def step_at(cache: Cache, work: ReplaySteps, number: int, at: int, details: Details) -> Step:
    """Step ``number``, the ``at``-th of those that ``details`` are of, as ``cache`` stands now."""
    first, last = work.offsets[number], work.offsets[number + 1]
    return Step(
        number,
        work.layer[number],
        work.keys[first:last],
        work.weights[first:last],
        details.logits[min(at, len(details.logits) - 1)],
        details.predicted[min(at, len(details.predicted) - 1)],
        work.tokens[number],
        cache.backlog[0],
        details.token_ids[details.row_offsets[at] : details.row_offsets[at + 1]],
        details.begins_pass[at],
        details.begins_sequence[at],
        cache.counters[HIT],
        cache.counters[LATE],
        cache.counters[MISS],
    )


def rows_at(at: int, details: Details) -> TokenRows:
    """The token rows of the ``at``-th step of those that ``details`` are of."""
    first, last = details.row_offsets[at], details.row_offsets[at + 1]
    return TokenRows(
        details.ids[first:last], details.weights[first:last], details.row_logits[first:last]
    )
