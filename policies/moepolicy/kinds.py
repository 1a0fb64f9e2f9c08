"""The kinds of decision the state machine takes."""

from __future__ import annotations

from enum import IntEnum


class WrongAnswer(ValueError):
    """A hook of the policy answered what it must not; the message begins with the hook."""


class Kind(IntEnum):
    """What the state machine decided. The values index ``Cache.counters``."""

    HIT = 0  # wanted and resident
    LATE = 1  # wanted and in flight: waited for
    MISS = 2  # wanted and neither
    QUEUE_PREFETCH = 3
    CANCEL = 4  # a queued prefetch the gate disproved
    DROP = 5  # a prefetch that found no place when its turn came
    LOAD = 6  # a demanded copy starts; other: the slot
    SPECULATE = 7  # a prefetch's copy starts; other: the slot
    BYPASS = 8  # a demanded copy that will not be kept
    EVICT = 9  # other: the key it makes room for
    PROMOTE = 10  # a staged expert becomes a cached one
    USELESS = 11  # prefetched, and gone before it was used
    COMPUTE = 12  # a miss that is computed where the experts are kept, and not copied
    SKIP = 13  # a miss that is neither copied nor computed: its part of the sum is left out
    LOW = 14  # a miss whose copy brings the lower precision
    SUBSTITUTE = 15  # a miss that another expert stands in for; other: that expert
    REROUTE = 16  # an expert that the gate chose for a token, and the policy replaced; no event


# Plain integers for the code that numba compiles.
HIT, LATE, MISS = int(Kind.HIT), int(Kind.LATE), int(Kind.MISS)
QUEUE_PREFETCH, CANCEL, DROP = int(Kind.QUEUE_PREFETCH), int(Kind.CANCEL), int(Kind.DROP)
LOAD, SPECULATE, BYPASS = int(Kind.LOAD), int(Kind.SPECULATE), int(Kind.BYPASS)
EVICT, PROMOTE, USELESS = int(Kind.EVICT), int(Kind.PROMOTE), int(Kind.USELESS)
COMPUTE, SKIP = int(Kind.COMPUTE), int(Kind.SKIP)
LOW, SUBSTITUTE = int(Kind.LOW), int(Kind.SUBSTITUTE)
REROUTE = int(Kind.REROUTE)
