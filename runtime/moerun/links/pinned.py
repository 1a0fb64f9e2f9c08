"""The link of a GPU: records in pinned host memory, copied by the device's own streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from queue import SimpleQueue
from typing import NamedTuple

from moerun.links.base import Done, SlotLink
from moerun.links.bus import Job
from moerun.links.copies import Copy, CopyQueue, Piece
from moerun.links.device import Device, Stream, StreamEvent
from moerun.links.host import HostTier
from moerun.links.slot import DualSlot, Slot, Variant
from moerun.links.slot_events import SlotEvents
from moerun.links.throttle import Throttle

PIECES_AHEAD = 2
"""Pieces that have the bus together: one crosses, the next is queued behind it, so that the device
goes from one to the other by itself. What is demanded waits for these and no others."""


class Crossing(NamedTuple):
    """What has been queued of a copy since the crossing before."""

    copy: Copy
    event: StreamEvent | None  # behind it; None: could not be made
    deadline_s: float  # from when on the cap lets it count as done (time.perf_counter)

    def wait(self) -> Exception | None:
        """Block until the pieces have crossed; returns the error if there was one."""
        try:
            if self.event is not None:
                self.event.wait()
        except Exception as error:
            return error
        return None


class PinnedStreams:
    """The memory of a host tier, pinned, and the streams of a device that copy from it."""

    def __init__(self, tier: HostTier, device: Device, n_streams: int) -> None:
        """Fills the tier where everything fits; owns it, and closes it if that fails. Raises
        RunError."""
        with ExitStack() as opened:
            opened.callback(tier.close)
            if tier.whole:
                tier.fill()
            device.pin(tier.memory)
            opened.callback(device.unpin, tier.memory)
            # Reached when nothing uses what the memory of the slots was before.
            self.memory_free = device.compute.record_event()
            self._streams: list[Stream] = [device.new_stream() for _ in range(n_streams)]
            for stream in self._streams:
                stream.wait_event(self.memory_free)
            opened.callback(device.synchronize)
            self._opened = opened.pop_all()

    def __getitem__(self, stream: int) -> Stream:
        return self._streams[stream]

    def close(self) -> None:
        """Wait for the device, unpin, and close the tier: all three, though one of them fails.
        Harmless when repeated."""
        self._opened.close()


class PinnedLink(SlotLink):
    """Copies records from pinned host memory, which holds all or some, into slots on the device.

    Whoever makes a piece of a record ready to cross queues it: the thread that submits the copy,
    the one that reads the record from disk, the one that sees an earlier piece arrive. Queueing
    takes no time, so nothing waits for another thread to wake up, and a record crosses while its
    end is still being read. One thread a stream waits for the events and reports.

    `CopyQueue` decides what crosses next, `SlotEvents` keep compute and copies apart.
    """

    def __init__(
        self,
        tier: HostTier,
        slots: Sequence[Slot | DualSlot],
        device: Device,
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        """Pins the memory of the tier, and fills it where everything fits. Raises RunError."""
        super().__init__(
            slots,
            tier.sizes,
            streams=streams,
            throttle=throttle,
            device=device.torch_device,
            chunk_bytes=chunk_bytes,
        )
        self.tier = tier
        self._device = device
        self._streams = PinnedStreams(tier, device, self.n_streams)
        self._events = SlotEvents(len(slots), self._streams.memory_free)
        self._copies = CopyQueue(
            streams=streams,
            n_streams=self.n_streams,
            chunk_bytes=chunk_bytes,
            # A capped bus is ours, not the device's: there is nothing to be queued ahead.
            max_on_bus=1 if throttle else PIECES_AHEAD,
        )
        self._crossings: list[SimpleQueue[Crossing | None]] = [
            SimpleQueue() for _ in range(self.n_streams)
        ]
        self._submitted = 0
        self._idle = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []

    def start(self, done: Done) -> None:
        """Start a thread for each stream; each calls ``done`` when a copy has ended."""
        self._done = done
        self._threads = [
            # A daemon: a caller that dies without closing must not hang at exit.
            threading.Thread(target=self._watch, args=(i,), name=f"link-{i}", daemon=True)
            for i in range(self.n_streams)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        """Queue a copy of the record of ``key`` into ``slot``, and return at once."""
        with self._lock:
            begin_s = time.perf_counter() if begin_s is None else begin_s
            self._submitted += 1
            self._copies.add(Job(key, slot, variant, begin_s, self._submitted, demand))
            self._advance()

    def want(self, key: int) -> None:
        """Demand a prefetch that waits or is under way, so that the host tier reads it first."""
        with self._lock:
            for job in self._copies.jobs():
                if job.key == key:
                    self.tier.want(job)

    def acquire(self, slot: int) -> None:
        """Let compute wait until the copy into ``slot`` has ended on its stream."""
        self._device.compute.wait_event(self._events.copied[slot])

    def release(self, slot: int) -> None:
        """Record the point in the compute stream behind which ``slot`` may be overwritten."""
        self._events.used[slot] = self._device.compute.record_event()

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        """Free ``withdrawn`` slots after their last use, then give ``granted`` slots memory."""
        for slot in withdrawn:
            self._events.used[slot].wait()
        try:
            super().resize(withdrawn, granted)
        finally:
            if withdrawn:
                self._device.trim()
        if granted:
            # Compute issued earlier may still use what this memory was before.
            self._events.grant(granted, self._device.compute.record_event())

    def close(self) -> None:
        """Let the copies under way end, then end the threads and give host memory back."""
        with self._idle:
            self._closing = True  # nobody waits for a capped copy any more
            while self._threads and not self._copies.idle:
                self._idle.wait()
        for crossings in self._crossings:
            crossings.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self._done = None  # so that a session and its slots go when their last user does
        self._streams.close()

    def _advance(self) -> None:
        """Queue all that may be queued now. The lock is held; called whenever that may be more."""
        while True:
            self._copies.take_up(self._begin)
            piece = self._copies.next_piece()
            if piece is None:
                return
            try:
                if piece.copy.held.error is not None:
                    raise piece.copy.held.error
                self._queue(piece)
            except Exception as error:
                self._give_up(piece.copy, error)

    def _begin(self, job: Job, stream: int) -> Copy:
        """Have the record read, if it must be."""
        held = self.tier.hold(job.key, job.variant, job=job, listener=self._more_is_read)
        return Copy(job, stream, held, self._sizes[job.variant])

    def _more_is_read(self) -> None:
        with self._lock:
            self._advance()

    def _queue(self, piece: Piece) -> None:
        """Queue a piece of a copy, and behind it an event if anybody waits for it."""
        copy, slot = piece.copy, piece.copy.job.slot
        stream = self._streams[copy.stream]
        if copy.into is None:
            stream.wait_event(self._events.used[slot])
            copy.into = self._destinations.of(copy.stream, slot, copy.job.variant)
        stream.copy(copy.into.landing[piece.span], copy.held.record[piece.span])
        deadline_s = 0.0
        if self._throttle:
            flows_s = max(copy.job.begin_s, piece.read_s)
            deadline_s = self._throttle.deadline_s(flows_s, piece.end - piece.begin)
        if piece.last:
            stream.run(copy.into.arrive)
        if piece.last or self.chunked:
            event = stream.record_event()
            if piece.last:
                self._events.copied[slot] = event
            self._expect(Crossing(copy, event, deadline_s))
        self._copies.queued(piece)

    def _give_up(self, copy: Copy, error: Exception) -> None:
        """Queue no more of a copy; it is reported when what was queued is done."""
        self._copies.fail(copy, error)
        try:
            event = self._streams[copy.stream].record_event()
        except Exception:  # the device is lost
            event = None
        self._expect(Crossing(copy, event, 0.0))

    def _expect(self, crossing: Crossing) -> None:
        self._copies.expect(crossing.copy)
        self._crossings[crossing.copy.stream].put(crossing)

    def _watch(self, stream: int) -> None:
        """See pieces arrive, have others follow, and report what is over; a thread's work."""
        while (crossing := self._crossings[stream].get()) is not None:
            error = crossing.wait()
            ended_s = max(time.perf_counter(), crossing.deadline_s)
            self.sleep_until(crossing.deadline_s)
            with self._lock:
                over = self._copies.reached(crossing.copy, error)
                if over:
                    crossing.copy.held.drop()
                self._advance()
            if over:
                self._report(crossing.copy, ended_s)

    def _report(self, copy: Copy, ended_s: float) -> None:
        assert self._done is not None
        if copy.error is None:
            self.count(copy.n_bytes, ended_s - copy.job.begin_s)
        with self._lock:
            self._copies.remove(copy)
        self._done(copy.job.key, copy.error, ended_s)
        with self._idle:
            self._idle.notify_all()
