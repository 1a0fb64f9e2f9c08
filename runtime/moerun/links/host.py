"""A cache of records in host memory: the middle of three tiers, between the disk and a device."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from moerun.amounts import counted, format_bytes, unit_hint
from moerun.errors import RunError, as_error
from moerun.links.base import Records
from moerun.links.bus import Job, Pieces
from moerun.links.host_memory import NOTHING_READ, Entry, Readable, RecordMemory
from moerun.links.record_readers import READ_BYTES, RecordReaders
from moerun.links.slot import Variant

Listener = Callable[[], None]


class Hold:
    """A record that stays in host memory until it is dropped. It may not have been read yet.

    A context manager; leaving it drops the record.
    """

    __slots__ = ("_entry", "_listener", "_tier")

    def __init__(self, tier: HostTier, entry: Entry, listener: Listener | None) -> None:
        self._tier = tier
        self._entry = entry
        self._listener = listener

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    @property
    def readable(self) -> Readable:
        """How many bytes of the record are there, and since when."""
        return NOTHING_READ if self._entry.moving else self._entry.readable

    @property
    def error(self) -> Exception | None:
        """The error of reading the record, after which no more of the record comes; or None."""
        return self._entry.error

    @property
    def record(self) -> torch.Tensor:
        """uint8[record_bytes], of which only the bytes that are ``readable`` may be read."""
        return self._tier.record_of(self._entry)

    def wait(self, n_bytes: int | None = None) -> torch.Tensor:
        """The record, once so many bytes are there (None: all). Raises the error of reading the
        record."""
        self._tier.wait(self, self._entry.n_bytes if n_bytes is None else n_bytes)
        return self.record

    def drop(self) -> None:
        """Give the record up, once, when nothing copies from the record any more."""
        self._tier.drop(self._entry, self._listener)


class HostTier:
    """The records used last, of both variants, in host memory; others are read when asked for.

    The least recently used records are evicted first, by bytes, as in the simulator's host cache;
    the order of use is the order in which copies begin. The tier may be shared between threads. A
    record that several threads want is read once; a record for which there is no memory is read
    when a copy has ended.

    `RecordMemory` keeps the places of records, `RecordReaders` read them; this class decides which
    records are there, who holds them and which are evicted. The class is long because all of that
    is decided under one lock.
    """

    def __init__(
        self,
        records: Records,
        n_bytes: int | None = None,
        low: Records | None = None,
        *,
        read_bytes: int = READ_BYTES,
    ) -> None:
        """Memory of ``n_bytes`` (None: for all), not yet filled. ``n_bytes`` must hold one record
        at least, and all that are held at once. Raises RunError where the machine has less
        memory."""
        stores = [records, *([low] if low else [])]
        self.n_keys = records.n_keys
        self.record_bytes = records.record_bytes
        self.sizes = records.record_bytes, low.record_bytes if low else 0
        """Bytes of a record by variant."""
        all_bytes = sum(store.n_keys * store.record_bytes for store in stores)
        self.whole = n_bytes is None or n_bytes >= all_bytes  # all records can be there
        self.hits = self.reads = 0
        n_bytes = all_bytes if n_bytes is None else min(n_bytes, all_bytes)
        self._memory = RecordMemory(n_bytes, self.sizes, aligned=not self.whole)
        self._entries: OrderedDict[tuple[int, Variant], Entry] = OrderedDict()  # least recent first
        self._changed = threading.Condition()
        self._readers = RecordReaders(stores, read_bytes)

    @property
    def memory(self) -> torch.Tensor:
        """All of the memory, uint8[n_bytes], which a device must pin."""
        return self._memory.memory

    def fill(self) -> None:
        """Read all records; there must be memory for all. Raises RunError for damaged records."""
        assert self.whole
        with ThreadPoolExecutor(2) as pool:  # one is checked while the other is read
            for variant in Variant:
                if self.sizes[variant]:
                    for _ in pool.map(partial(_bring, self, variant), range(self.n_keys)):
                        pass
        self.hits = self.reads = 0

    def record(self, key: int) -> torch.Tensor:
        """The record of ``key``, uint8[record_bytes], not to be written to. All records must be
        there."""
        assert self.whole, "not all records are there"
        return self.record_of(self._entries[key, Variant.FULL])

    def hold(
        self,
        key: int,
        variant: Variant = Variant.FULL,
        *,
        job: Job | None = None,
        listener: Listener | None = None,
    ) -> Hold:
        """Keep a record in its place until the hold is dropped. Returns at once.

        A record that is not there is read as ``job`` (None: as a demand). A reading thread calls
        ``listener`` whenever more of the record is there, or reading has failed. Errors of reading
        name expert and file.
        """
        with self._changed:
            entry = self._entries.get((key, variant))
            if entry is not None:
                self.hits += 1
                entry.holders += 1
                self._entries.move_to_end((key, variant))
            else:
                self.reads += 1
                entry = Entry(key, variant, self.sizes[variant])
                self._entries[key, variant] = entry
                entry.holders += 1  # besides its read
                self._readers.run(partial(self._read, entry, job or Job(key, -1, variant, 0.0)))
            if listener is not None:
                entry.listeners.append(listener)
        return Hold(self, entry, listener)

    def want(self, job: Job) -> None:
        """Treat the prefetch ``job`` as a demand from now on."""
        self._readers.want(job)

    def wait(self, hold: Hold, n_bytes: int) -> None:
        """Wait until ``n_bytes`` of a hold's record are there. Raises the error of reading the
        record."""
        with self._changed:
            while hold.readable.n_bytes < n_bytes:
                if hold.error is not None:
                    raise hold.error
                self._changed.wait()

    def drop(self, entry: Entry, listener: Listener | None) -> None:
        """Release a hold: its record may be evicted when memory is needed."""
        with self._changed:
            if listener is not None:
                entry.listeners.remove(listener)
            self._let_go(entry)

    def record_of(self, entry: Entry) -> torch.Tensor:
        """The record of a hold, uint8[record_bytes]."""
        return self._memory.view(entry)

    def read_into(
        self,
        key: int,
        buffer: torch.Tensor,
        *,
        pieces: Pieces | None = None,
        variant: Variant = Variant.FULL,
        job: Job | None = None,
    ) -> None:
        """Copy a record out, in ``pieces`` or as it is read. Raises the error of reading the
        record."""
        with self.hold(key, variant, job=job) as held:
            if pieces:
                held.wait()  # or a piece would have the bus while it is waited for
            for piece in (pieces or self._readers.cut)(len(buffer)):
                buffer[piece].copy_(held.wait(piece.stop)[piece])

    def close(self) -> None:
        """End the readers, and close their store if the tier owns it. May be called again."""
        self._readers.close()

    def _read(self, entry: Entry, job: Job) -> None:
        """Find room for an entry and read it; by a reading thread."""
        try:
            self._find_room(entry)
            self._readers.read(job, self.record_of(entry), partial(self._arrived, entry))
        except BaseException as error:
            with self._changed:
                entry.error = as_error(error)
                del self._entries[entry.key, entry.variant]
                self._let_go(entry)
        else:
            with self._changed:
                entry.readable = Readable(entry.n_bytes, time.perf_counter())
                self._let_go(entry)
        self._notify(entry)

    def _arrived(self, entry: Entry, n_bytes: int) -> None:
        with self._changed:
            entry.readable = Readable(n_bytes, time.perf_counter())
            self._changed.notify_all()
        self._notify(entry)

    def _notify(self, entry: Entry) -> None:
        """Tell the holders of the entry. The lock must not be held: listeners may hold other
        records."""
        with self._changed:
            listeners = list(entry.listeners)
        for listener in listeners:
            listener()

    def _let_go(self, entry: Entry) -> None:
        """One holder less. The lock must be held."""
        entry.holders -= 1
        if entry.error is not None and not entry.holders:  # nobody will find it any more
            self._memory.remove(entry)
        self._changed.notify_all()

    def _find_room(self, entry: Entry) -> None:
        """Give an entry memory, waiting for copies to end where there is none.

        Records are moved before any is evicted, so that which records stay depends on the bytes
        alone.
        """
        while True:
            with self._changed:
                if self._memory.place(entry):
                    return
                occupant = self._memory.in_the_way(entry.variant)
                if occupant is None:
                    if not self._evict():
                        self._changed.wait()
                    continue
                if occupant.holders:
                    self._changed.wait()
                    continue
                occupant.holders, occupant.moving = 1, True
                move = self._memory.begin_move(occupant)
            self._memory.copy(move)
            with self._changed:
                self._memory.end_move(move)
                occupant.moving = False
                self._let_go(occupant)
            self._notify(occupant)  # who asked for it meanwhile has waited

    def _evict(self) -> bool:
        """Drop the record used longest ago that nobody holds; False where all are held."""
        victim = next((entry for entry in self._entries.values() if not entry.holders), None)
        if victim is None:
            return False
        del self._entries[victim.key, victim.variant]
        self._memory.remove(victim)
        return True


def _bring(tier: HostTier, variant: Variant, key: int) -> None:
    with tier.hold(key, variant) as held:
        held.wait()


def host_tier(
    records: Records, host_bytes: int | None, copies: int = 1, low: Records | None = None
) -> HostTier:
    """A tier of ``host_bytes``, or of memory for all records. Each of ``copies`` under way holds a
    record.

    Raises RunError where ``host_bytes`` is too little, or more than the memory there is.
    """
    largest = max(records.record_bytes, low.record_bytes if low else 0)
    if host_bytes is not None and host_bytes < copies * largest:
        raise RunError(
            f"{format_bytes(host_bytes)} of host memory hold "
            f"{counted(host_bytes // largest, 'expert')} of "
            f"{format_bytes(largest)}: give --host-memory {copies * largest} (bytes) or more"
            f"{unit_hint(host_bytes)}"
        )
    return HostTier(records, host_bytes, low)
