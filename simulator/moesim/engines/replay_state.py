"""What the replay's machine is between two moments: its clocks, its copies, the host's cache.

Arrays, because compiled code works on them; `moesim.engines.replay` moves them on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from moepolicy.steps import Step
from numpy.typing import NDArray

from moesim.engines.in_simpy import Clock, Segment
from moesim.machine.costs import Costs
from moesim.workload.steps import Workload

NEVER = np.iinfo(np.int64).max

# Entries of Link.clock.
NOW = 0
BUS_UNTIL = 1  # end of the piece on the bus; NEVER when it is idle
BUS_COPY = 2  # whose it is
DISK_FREE_AT = 3
STARTED = 4  # copies so far
ARRIVED = 5  # arrivals so far
N_SEGMENTS = 6
HOST_BYTES = 7  # of the records in the host's cache
DECODE_NS = 8
PROMPT_NS = 9
STALL_NS = 10
LINK_BUSY_NS = 11
N_COPIES = 12  # under way
CLOCK_ENTRIES = 13

# Columns of Link.copies, a row a stream. KEY is -1 where the stream is free.
KEY = 0
NUMBER = 1
WANTED_NOW = 2
READY_AT = 3
PIECES = 4
COPY_IS_LOW = 5
FOLLOWED_AT = 6  # when a copy of this stream last ended that others waited for
COPY_COLUMNS = 7

# Columns of Link.host: the neighbours in order of use. NEWER is -1 where the key is not there.
NEWER = 0
OLDER = 1


class Link(NamedTuple):
    """Everything of the machine that lasts from step to step."""

    clock: NDArray[np.int64]  # [CLOCK_ENTRIES]
    copies: NDArray[np.int64]  # [streams, COPY_COLUMNS]
    arrival: NDArray[np.int64]  # [n_keys] which arrival the key's latest was
    host: NDArray[np.int64]  # [records + 1, 2] its cache, a ring by use; the last row begins it
    cpu_free_at: NDArray[np.int64]  # [workers]
    segments: NDArray[np.int64]  # [capacity, 6] the timeline; capacity 0: not kept


class Work(NamedTuple):
    """The steps of a workload, as compiled code takes them."""

    keys: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    layer: NDArray[np.int32]
    tokens: NDArray[np.int32]
    decode: NDArray[np.bool_]


def new_link(costs: Costs, n_keys: int, n_segments: int = 0) -> Link:
    clock = np.zeros(CLOCK_ENTRIES, np.int64)
    clock[BUS_UNTIL] = NEVER
    copies = np.full((costs.streams * (2 if costs.chunked else 1), COPY_COLUMNS), -1, np.int64)
    n_records = n_keys * (2 if costs.low_bytes else 1)
    host = np.full((n_records + 1, 2), -1, np.int64)
    host[n_records] = n_records
    return Link(
        clock=clock,
        copies=copies,
        arrival=np.zeros(n_keys, np.int64),
        host=host,
        cpu_free_at=np.zeros(costs.cpu_workers, np.int64),
        segments=np.zeros((n_segments, 6), np.int64),
    )


def work_of(workload: Workload) -> Work:
    return Work(
        workload.keys,
        workload.weights,
        workload.offsets,
        workload.layer,
        workload.tokens,
        workload.decode,
    )


def clock_of(link: Link) -> Clock:
    """Where the time went until now."""
    clock = link.clock
    segments = link.segments[: clock[N_SEGMENTS]].tolist()
    return Clock(
        total_ns=int(clock[NOW]),
        decode_ns=int(clock[DECODE_NS]),
        prompt_ns=int(clock[PROMPT_NS]),
        stall_ns=int(clock[STALL_NS]),
        link_busy_ns=int(clock[LINK_BUSY_NS]),
        segments=[Segment(*row) for row in segments] if len(link.segments) else None,
    )


def step_at(
    work: Work,
    number: int,
    row: int,
    logits: NDArray[np.float32],
    predicted: NDArray[np.float32],
    backlog: int,
) -> Step:
    """Step ``number``, whose logits and predictions are in ``row``, or in the one there is."""
    at, until = work.offsets[number], work.offsets[number + 1]
    return Step(
        number,
        work.layer[number],
        work.keys[at:until],
        work.weights[at:until],
        logits[min(row, len(logits) - 1)],
        predicted[min(row, len(predicted) - 1)],
        work.tokens[number],
        backlog,
    )
