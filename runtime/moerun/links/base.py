"""The protocol that every link follows, and what all links have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moerun.links.arena import Arena
from moerun.links.bus import Pieces
from moerun.links.slot import Destinations, DualSlot, Sizes, Slot, Variant
from moerun.links.throttle import Throttle
from moerun.ranges import check_ways

Done = Callable[[int, Exception | None, float], None]
"""Called for each copy, by a thread of the link, with three arguments: the key, what went wrong
(None: the expert is there), and when the copy ended (time.perf_counter)."""


@dataclass
class LinkStatistics:
    """What a link has done so far. ``busy_s`` sums over its streams."""

    copies: int = 0
    bytes_copied: int = 0
    busy_s: float = 0.0


class Records(Protocol):
    """Where a link reads from: an expert store, by key."""

    @property
    def n_keys(self) -> int:
        """Number of records."""

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        """Fill ``buffer``, uint8[record_bytes] on the host, in ``pieces`` if they are given.

        The errors name expert and file.
        """


class Link(Protocol):
    """Copies expert records into numbered device slots, ``streams`` of them at a time.

    Where records travel in pieces (``chunked``) demand and prefetch have so many streams each, and
    demand overtakes between two pieces. The caller has no more copies under way and never
    overwrites a slot that a pinned key lies in; the link sees to it that a copy into a slot waits
    for the kernels that still read it, and that a kernel waits for exactly its expert.
    """

    streams: int
    chunked: bool
    slots: Sequence[Any]  # each a Slot, or a DualSlot where there is a lower precision
    statistics: LinkStatistics

    def start(self, done: Done) -> None:
        """Begin work; ``done`` is called from the link's threads. Once, before any ``submit``."""

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        """Copy ``key``'s record of this variant into ``slot``. Returns at once.

        ``begin_s`` is when the copy counts as begun (time.perf_counter; None: now). ``done`` passes
        on when its copy ended, so that a copy asked for there follows without a gap, as on a bus
        that has its next command queued.
        """

    def want(self, key: int) -> None:
        """Treat the prefetch of ``key``, which is under way, as a demand from now on."""

    def acquire(self, slot: int) -> None:
        """The compute issued from now on reads ``slot``, whose copy is done."""

    def release(self, slot: int) -> None:
        """The compute issued up to now was the last to read ``slot``'s present content."""

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        """Free the memory of some slots, then give some theirs. Raises RunError if there is none.

        Nothing travels to those that go, and no compute to come reads them.
        """

    def close(self) -> None:
        """End the threads, after the copies under way. Harmless when repeated."""


class SlotLink:
    """The part that links share: slots, streams, the cap, how much travelled."""

    def __init__(
        self,
        slots: Sequence[Slot | DualSlot],
        sizes: Sizes,
        *,
        streams: int,
        throttle: Throttle | None,
        device: torch.device,
        chunk_bytes: int = 0,
    ) -> None:
        """``device`` is where records that cannot land in their slots lie first. With
        ``chunk_bytes`` records travel in pieces. Raises RunError for streams or pieces out of
        range."""
        check_ways(streams, chunk_bytes)
        self.slots = slots
        self.streams = streams
        self.statistics = LinkStatistics()
        self.chunked = chunk_bytes > 0
        # Guesses that travel in pieces have streams of their own, so that demand finds one free.
        self.n_streams = streams * (2 if self.chunked else 1)
        self._chunk_bytes = chunk_bytes
        self._sizes = sizes
        self._destinations = Destinations(slots, sizes, n_streams=self.n_streams, device=device)
        self._throttle = throttle
        self._done: Done | None = None
        self._closing = False
        self._lock = threading.RLock()

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        """Give ``granted`` slots memory and take that of ``withdrawn`` slots away."""
        assert isinstance(self.slots, Arena), "these slots were made to stay"
        self.slots.resize(withdrawn, granted)

    def count(self, n_bytes: int, busy_s: float) -> None:
        """Note that a copy has ended."""
        with self._lock:
            self.statistics.copies += 1
            self.statistics.bytes_copied += n_bytes
            self.statistics.busy_s += busy_s

    def sleep_until(self, deadline_s: float) -> None:
        """Hold a capped copy back (time.perf_counter); not once the link is being closed."""
        while not self._closing and (left_s := deadline_s - time.perf_counter()) > 0:
            time.sleep(min(left_s, _PATIENCE_S))


_PATIENCE_S = 0.05  # how long closing may wait for a thread that holds a copy back
