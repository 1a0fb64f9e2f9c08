"""The protocol every link follows, what all links have, and the cap on their bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from moerun.errors import UsageError
from moerun.format.layout import RECORD_ALIGN
from moerun.links.arena import Arena, device_memory
from moerun.links.bus import Pieces

Done = Callable[[int, Exception | None], None]
"""Told of each copy, by the link's own thread: the key, and what went wrong (None: it is there)."""


@dataclass
class LinkStatistics:
    """What a link has done so far. ``busy_s`` sums over its streams."""

    copies: int = 0
    bytes_copied: int = 0
    busy_s: float = 0.0


class Records(Protocol):
    """Where a link reads from: an expert store, by key."""

    @property
    def n_keys(self) -> int: ...

    @property
    def record_bytes(self) -> int: ...

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        """Fill ``buffer``, uint8[record_bytes] on the host, in ``pieces`` if they are given.

        The errors name expert and file.
        """


class Slot(Protocol):
    """Memory on the device that experts come and go in."""

    @property
    def landing(self) -> torch.Tensor | None:
        """Where a record is to land, uint8[record_bytes]; None: it must land elsewhere first."""

    def arrive(self, record: torch.Tensor) -> None:
        """Make the expert whose record is in ``record`` computable; work on the current stream."""


class DualSlot(NamedTuple):
    """Memory for an expert of either precision, one at a time, in the form of each."""

    full: Slot
    low: Slot


def in_form(slot: Slot | DualSlot, low: bool) -> Slot:
    """The slot as an expert of the one precision, or of the lower one, is computed from it."""
    if isinstance(slot, DualSlot):
        return slot.low if low else slot.full
    return slot


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

    def submit(self, key: int, slot: int, low: bool = False, *, demand: bool = True) -> None:
        """Copy ``key``'s record, or that of the lower precision, into ``slot``. Returns at once."""

    def want(self, key: int) -> None:
        """A prefetch under way turned out to be wanted now."""

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


@dataclass
class Throttle:
    """Makes copies take as long as a slower bus would: latency, then bytes at a bandwidth.

    Latencies of several streams overlap, their bytes go one copy after the other. Every deadline
    follows from the one before while copies queue, so late wake-ups do not add up.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    _free_s: float = 0.0  # when the bus has carried everything promised so far
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def deadline_s(self, begin_s: float, n_bytes: int) -> float:
        """When a copy that began at ``begin_s`` may be called done (time.perf_counter)."""
        with self._lock:
            flows_s = max(begin_s + self.latency_s, self._free_s)
            self._free_s = flows_s + n_bytes / self.bytes_per_s
            return self._free_s


def check_ways(streams: int, chunk_bytes: int) -> None:
    """UsageError where no link could carry records so."""
    if not 1 <= streams <= 3:
        raise UsageError(f"streams must be 1, 2 or 3, not {streams}")
    if chunk_bytes < 0 or chunk_bytes % RECORD_ALIGN:
        raise UsageError(f"a chunk must be a multiple of {RECORD_ALIGN} bytes, not {chunk_bytes}")


class SlotLink:
    """The part that links share: slots, memory for what cannot land in them, how much travelled."""

    def __init__(
        self,
        slots: Sequence[Slot | DualSlot],
        *,
        record_bytes: int,
        streams: int,
        throttle: Throttle | None,
        scratch_device: torch.device,
        low_record_bytes: int = 0,
        chunk_bytes: int = 0,
    ) -> None:
        """With ``chunk_bytes`` records travel in pieces. Raises RunError for streams or pieces out
        of range."""
        check_ways(streams, chunk_bytes)
        self.slots = slots
        self.streams = streams
        self.statistics = LinkStatistics()
        self.chunked = chunk_bytes > 0
        self._chunk_bytes = chunk_bytes
        self._bytes = record_bytes, low_record_bytes
        self._throttle = throttle
        self._done: Done | None = None
        self._closing = False
        self._lock = threading.RLock()
        # For records that cannot land in their slots.
        scratch_bytes = max(
            self._bytes[low] if slots and in_form(slots[0], low).landing is None else 0
            for low in (False, True)
        )
        # Guesses that travel in pieces have streams of their own, so that demand finds one free.
        self._scratch = [
            device_memory(max(scratch_bytes, 1), scratch_device)
            for _ in range(streams * (2 if chunk_bytes else 1))
        ]

    def destination(self, stream: int, slot: int, low: bool) -> tuple[Slot, torch.Tensor]:
        """The slot, and where a record for it is to land: there, or in the stream's own memory."""
        into = in_form(self.slots[slot], low)
        landing = into.landing
        return into, self._scratch[stream][: self._bytes[low]] if landing is None else landing

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
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
