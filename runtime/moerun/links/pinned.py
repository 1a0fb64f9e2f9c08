"""The link of a GPU: records in pinned host memory, copied by the device's own lanes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch

from moerun.links.base import Done, DualSlot, Slot, SlotLink, Throttle
from moerun.links.bus import Job, rank_of
from moerun.links.host import Hold, HostTier
from moerun.links.lanes import Lane, Lanes, Mark

PIECES_AHEAD = 2
"""Pieces that have the bus together: one crosses, the next is queued behind it, so that the device
goes from one to the other by itself. What is demanded waits for these and no others."""


@dataclass(eq=False, slots=True)
class Copy:
    """A record on its way over a lane."""

    job: Job
    lane: int
    held: Hold
    n_bytes: int
    into: Slot | None = None  # and where on the device the record lands, from its first piece on
    landing: torch.Tensor | None = None
    queued: int = 0  # bytes
    marks: int = 0  # not yet reached
    error: Exception | None = None

    @property
    def over(self) -> bool:
        """Nothing of it is in a lane any more, nor will be."""
        return not self.marks and (self.error is not None or self.queued == self.n_bytes)


Crossing = tuple[Copy, Mark | None, float]
"""A mark behind what has been queued of a copy (None: could not be made), and from when on the
cap lets it count as done."""


class PinnedLink(SlotLink):
    """Copies records from pinned host memory, which holds all or some, into slots on the device.

    Whoever makes a piece of a record ready to cross queues it: the thread that submits the copy,
    the one that reads the record from disk, the one that sees an earlier piece arrive. Queueing
    takes no time, so nothing waits for another thread to wake up, and a record crosses while its
    end is still being read. One thread a lane waits for the marks and reports.

    Each slot has two marks. ``copied`` lies behind its copy, and compute waits for it before it
    reads the slot; ``used`` lies behind the last compute that read it, and the next copy into the
    slot waits for it. Both waits are the device's: no thread takes part.
    """

    def __init__(
        self,
        tier: HostTier,
        slots: Sequence[Slot | DualSlot],
        lanes: Lanes,
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        """Pins the memory of the tier, and fills it where everything fits. Raises RunError."""
        super().__init__(
            slots,
            record_bytes=tier.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=lanes.device,
            low_record_bytes=tier.low_record_bytes,
            chunk_bytes=chunk_bytes,
        )
        self.tier = tier
        # A capped bus is ours, not the device's: there is nothing to be queued ahead.
        self._pieces_ahead = 1 if throttle else PIECES_AHEAD
        try:
            if tier.whole:
                tier.fill()
            lanes.pin(tier.memory)
        except BaseException:
            tier.close()
            raise
        self._device = lanes
        self._pinned = True
        try:
            born = lanes.compute.mark()  # what had this memory before may still be computing
            self._lanes: list[Lane] = [lanes.open() for _ in self._scratch]
            for lane in self._lanes:
                lane.after(born)
        except BaseException:
            lanes.unpin(tier.memory)
            tier.close()
            raise
        self._copied = [born] * len(slots)
        self._used = [born] * len(slots)
        self._waiting: deque[Job] = deque()
        self._copies: list[Copy] = []
        self._loading: list[Copy | None] = [None] * len(self._lanes)  # by lane, not all queued
        self._crossings: list[SimpleQueue[Crossing | None]] = [SimpleQueue() for _ in self._lanes]
        self._on_bus = 0  # pieces
        self._submitted = 0
        self._idle = threading.Condition(self._lock)
        self._reporting = threading.local()
        self._threads: list[threading.Thread] = []

    def start(self, done: Done) -> None:
        self._done = done
        self._threads = [
            # A daemon: a caller that dies without closing must not hang at exit.
            threading.Thread(target=self._watch, args=(i,), name=f"link-{i}", daemon=True)
            for i in range(len(self._lanes))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: int, slot: int, low: bool = False, *, demand: bool = True) -> None:
        with self._lock:
            now_s = time.perf_counter()
            self._submitted += 1
            job = Job(key, slot, low, now_s, self._submitted, demand)
            # What is asked for while the copy before it is being reported follows without a gap.
            job.begin_s = getattr(self._reporting, "ended_s", now_s)
            self._waiting.append(job)
            self._advance()

    def want(self, key: int) -> None:
        with self._lock:
            for job in (*self._waiting, *(copy.job for copy in self._copies)):
                if job.key == key:
                    self.tier.want(job)

    def acquire(self, slot: int) -> None:
        self._device.compute.after(self._copied[slot])

    def release(self, slot: int) -> None:
        self._used[slot] = self._device.compute.mark()

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        for slot in withdrawn:
            self._used[slot].wait()
        try:
            super().resize(withdrawn, granted)
        finally:
            if withdrawn:
                self._device.trim()
        if granted:
            # Compute issued earlier may still use what this memory was before.
            born = self._device.compute.mark()
            more = max(granted) + 1 - len(self._used)
            self._used += [born] * more
            self._copied += [born] * more
            for slot in granted:
                self._used[slot] = born

    def close(self) -> None:
        with self._idle:
            self._closing = True  # nobody waits for a capped copy any more
            while self._threads and (self._copies or self._waiting):
                self._idle.wait()
        for crossings in self._crossings:
            crossings.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self._done = None  # so that a session and its slots go when their last user does
        if self._pinned:
            self._pinned = False
            try:
                self._device.drain()
            finally:  # of a device that is lost, too
                try:
                    self._device.unpin(self.tier.memory)
                finally:
                    self.tier.close()

    def _advance(self) -> None:
        """Queue all that may be queued now. The lock is held; called whenever that may be more."""
        while True:
            self._take_up()
            copy = self._next()
            if copy is None:
                return
            try:
                if copy.held.error is not None:
                    raise copy.held.error
                self._queue(copy)
            except Exception as error:
                self._give_up(copy, error)

    def _take_up(self) -> None:
        """Have the records read of copies for which there is a lane."""
        for job in list(self._waiting):
            lanes = range(self.streams) if job.demand else range(len(self._lanes))[-self.streams :]
            free = [lane for lane in lanes if self._loading[lane] is None]
            if not free:
                continue
            taken = [copy.lane for copy in self._copies]
            lane = min(free, key=taken.count)
            self._waiting.remove(job)
            held = self.tier.hold(job.key, job.low, job=job, tell=self._more_is_read)
            self._loading[lane] = copy = Copy(job, lane, held, self._bytes[job.low])
            self._copies.append(copy)

    def _next(self) -> Copy | None:
        """Of what could cross now, or has failed: demand first, then what was submitted first."""
        full = self.chunked and self._on_bus >= self._pieces_ahead
        able = [
            copy
            for copy in self._loading
            if copy is not None
            and (copy.held.error is not None or (not full and self._piece_end(copy) > copy.queued))
        ]
        return min(able, key=lambda copy: rank_of(copy.job), default=None)

    def _piece_end(self, copy: Copy) -> int:
        """Where the piece ends that could cross next: if not chunked, with all that is there."""
        readable = copy.held.readable
        if not self.chunked:
            return readable
        end = min(copy.queued + self._chunk_bytes, copy.n_bytes)
        return end if readable >= end else copy.queued

    def _queue(self, copy: Copy) -> None:
        """Queue the next piece of a copy, and behind it a mark if anybody waits for it."""
        lane, slot = self._lanes[copy.lane], copy.job.slot
        if copy.landing is None:
            lane.after(self._used[slot])
            copy.into, copy.landing = self.destination(copy.lane, slot, copy.job.low)
        assert copy.into is not None
        piece = slice(copy.queued, self._piece_end(copy))
        lane.copy(copy.landing[piece], copy.held.record[piece])
        deadline_s = 0.0
        if self._throttle:
            flows_s = max(copy.job.begin_s, copy.held.read_s)
            deadline_s = self._throttle.deadline_s(flows_s, piece.stop - piece.start)
        whole = piece.stop == copy.n_bytes
        if whole:
            lane.run(partial(copy.into.arrive, copy.landing))
        if whole or self.chunked:
            mark = lane.mark()
            if whole:
                self._copied[slot] = mark
                self._loading[copy.lane] = None
            self._put(copy, mark, deadline_s)
        copy.queued = piece.stop

    def _give_up(self, copy: Copy, error: Exception) -> None:
        """Queue no more of a copy; it is reported when what was queued is done."""
        copy.error = error
        self._loading[copy.lane] = None
        try:
            mark = self._lanes[copy.lane].mark()
        except Exception:  # the device is lost
            mark = None
        self._put(copy, mark, 0.0)

    def _put(self, copy: Copy, mark: Mark | None, deadline_s: float) -> None:
        copy.marks += 1
        self._on_bus += 1
        self._crossings[copy.lane].put((copy, mark, deadline_s))

    def _more_is_read(self) -> None:
        with self._lock:
            self._advance()

    def _watch(self, lane: int) -> None:
        """See pieces arrive, have others follow, and report what is over; a thread's work."""
        while (crossing := self._crossings[lane].get()) is not None:
            copy, mark, deadline_s = crossing
            error = None
            try:
                if mark is not None:
                    mark.wait()
            except Exception as failure:
                error = failure
            ended_s = max(time.perf_counter(), deadline_s)
            self.sleep_until(deadline_s)
            with self._lock:
                copy.marks -= 1
                self._on_bus -= 1
                if error is not None:
                    copy.error = copy.error or error
                    if self._loading[lane] is copy:
                        self._loading[lane] = None
                if copy.over:
                    copy.held.drop()
                self._advance()
            if copy.over:
                self._report(copy, ended_s)

    def _report(self, copy: Copy, ended_s: float) -> None:
        assert self._done is not None
        if copy.error is None:
            self.count(copy.n_bytes, ended_s - copy.job.begin_s)
        with self._lock:
            self._copies.remove(copy)
        self._reporting.ended_s = ended_s
        try:
            self._done(copy.job.key, copy.error)
        finally:
            del self._reporting.ended_s
        with self._idle:
            self._idle.notify_all()
