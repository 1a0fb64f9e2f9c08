"""The middle of three tiers: a cache of records in host memory between the disk and a device."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from moerun.amounts import format_bytes
from moerun.devices import free_bytes
from moerun.errors import RunError
from moerun.format.layout import RECORD_ALIGN
from moerun.links.arena import device_memory
from moerun.links.base import Records
from moerun.links.bus import Job, Pieces, Turns
from moerun.links.direct import DirectRecords
from moerun.links.two_sizes import Places

READ_BYTES = 8 << 20
"""The pieces that records are read in: large enough for the disk to have many requests of one at
once, small enough for the link to take up a record long before the last is there."""

_READERS = 8  # threads at most: one for each copy that a link may have under way, and to spare

Tell = Callable[[], None]


@dataclass(eq=False, slots=True)
class Entry:
    """One record's place. ``holders`` counts copies under way from it, its read and its move."""

    key: int
    low: bool
    n_bytes: int
    place: int = -1  # none yet
    readable: int = 0  # bytes from its start on; all of them once their checksum is verified
    read_s: float = 0.0  # when the last of those came (time.perf_counter)
    holders: int = 1
    moving: bool = False
    error: Exception | None = None
    tells: list[Tell] = field(default_factory=list)


class Hold:
    """A record that stays in host memory until it is dropped, though it may not be there yet.

    A context manager, which drops it.
    """

    __slots__ = ("_entry", "_tell", "_tier")

    def __init__(self, tier: HostTier, entry: Entry, tell: Tell | None) -> None:
        self._tier = tier
        self._entry = entry
        self._tell = tell

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    @property
    def readable(self) -> int:
        """How many bytes from its start on are there. All of them only when they are verified."""
        return 0 if self._entry.moving else self._entry.readable

    @property
    def read_s(self) -> float:
        """When the last of these came (time.perf_counter); 0.0 if they had always been there."""
        return self._entry.read_s

    @property
    def error(self) -> Exception | None:
        """What went wrong with reading it: the rest will not come."""
        return self._entry.error

    @property
    def record(self) -> torch.Tensor:
        """uint8[record_bytes], of which only what is ``readable`` may be looked at."""
        return self._tier.memory_of(self._entry)

    def wait(self, n_bytes: int | None = None) -> torch.Tensor:
        """The record, once so many bytes are there (None: all). Raises what reading it raised."""
        self._tier.wait(self, self._entry.n_bytes if n_bytes is None else n_bytes)
        return self.record

    def drop(self) -> None:
        """Once, when nothing copies from it any more."""
        self._tier.drop(self._entry, self._tell)


class HostTier:
    """The records used last, of both precisions, in host memory; others are read when asked for.

    Least recently used goes first, by bytes, as in the simulator's host cache; the order is that
    in which copies begin. Safe to share between threads: what several want is read once, and a
    record for which there is no place is read when a copy has ended. The disk reads one record at a
    time, the demanded before the guessed (`Turns`): what is waited for has all of it, and the next
    is begun while the last is still verified, or crossing to the device.
    """

    def __init__(
        self,
        records: Records,
        n_bytes: int | None = None,
        low: Records | None = None,
        *,
        read_bytes: int = READ_BYTES,
    ) -> None:
        """Memory of ``n_bytes`` (None: for all), not yet filled: one record's at least, and of all
        that are held at once. Raises RunError where there is not so much."""
        self._stores = [records, *([low] if low else [])]
        self.n_keys = records.n_keys
        self.record_bytes = records.record_bytes
        self.low_record_bytes = low.record_bytes if low else 0
        all_bytes = sum(store.n_keys * store.record_bytes for store in self._stores)
        self.whole = n_bytes is None or n_bytes >= all_bytes
        """Whether it has room for everything."""
        self.hits = 0
        self.reads = 0
        self.memory = _memory(all_bytes if n_bytes is None else min(n_bytes, all_bytes))
        assert len(self.memory) >= max(self.record_bytes, self.low_record_bytes)
        usable = len(self.memory) if self.whole else len(self.memory) // RECORD_ALIGN * RECORD_ALIGN
        self._places = Places(usable, (self.record_bytes, self.low_record_bytes))
        self._entries: OrderedDict[tuple[int, bool], Entry] = OrderedDict()  # least recent first
        self._seated: dict[tuple[bool, int], Entry] = {}  # by place
        self._read_bytes = read_bytes
        self._turns = Turns()
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(_READERS, "reader")

    def fill(self) -> None:
        """Read everything, which there must be room for; raises RunError for damaged records."""
        assert self.whole
        with ThreadPoolExecutor(2) as pool:  # one is checked while the other is read
            for low in range(len(self._stores)):
                for _ in pool.map(partial(self._bring, low=bool(low)), range(self.n_keys)):
                    pass
        self.hits = self.reads = 0

    def record(self, key: int) -> torch.Tensor:
        """The record of ``key``, uint8[record_bytes], not to be written to. All must be there."""
        assert self.whole, "not all records are there"
        return self.memory_of(self._entries[key, False])

    def hold(
        self, key: int, low: bool = False, *, job: Job | None = None, tell: Tell | None = None
    ) -> Hold:
        """The record, which stays where it is until it is dropped. Returns at once.

        It is read, if it must be, as ``job`` is (None: as what is wanted); ``tell`` is called from
        a reading thread whenever more of it is there, or it has failed. Reading's errors name
        expert and file.
        """
        with self._changed:
            entry = self._entries.get((key, low))
            if entry is not None:
                self.hits += 1
                entry.holders += 1
                self._entries.move_to_end((key, low))
            else:
                self.reads += 1
                entry = Entry(key, low, self._stores[low].record_bytes)
                self._entries[key, low] = entry
                entry.holders += 1  # besides its read
                self._readers.submit(self._read, entry, job or Job(key, -1, low, 0.0))
            if tell is not None:
                entry.tells.append(tell)
        return Hold(self, entry, tell)

    def want(self, job: Job) -> None:
        """What was guessed is demanded from now on."""
        self._turns.want(job)

    def wait(self, hold: Hold, n_bytes: int) -> None:
        """As ``Hold.wait``."""
        with self._changed:
            while hold.readable < n_bytes:
                if hold.error is not None:
                    raise hold.error
                self._changed.wait()

    def drop(self, entry: Entry, tell: Tell | None) -> None:
        """As ``Hold.drop``."""
        with self._changed:
            if tell is not None:
                entry.tells.remove(tell)
            self._let_go(entry)

    def memory_of(self, entry: Entry) -> torch.Tensor:
        """Where an entry that has a place lies."""
        return self.memory[self._places.at(entry.low, entry.place)]

    def read_into(
        self,
        key: int,
        buffer: torch.Tensor,
        *,
        pieces: Pieces | None = None,
        low: bool = False,
        job: Job | None = None,
    ) -> None:
        """Copy a record out, in ``pieces`` or as it is read. Raises what reading it raised."""
        with self.hold(key, low, job=job) as held:
            if pieces:
                held.wait()  # or a piece would have the bus while it is waited for
            for piece in (pieces or self._cut)(len(buffer)):
                buffer[piece].copy_(held.wait(piece.stop)[piece])

    def close(self) -> None:
        """End the readers, and close what they read from if that is the tier's own. Harmless when
        repeated."""
        self._readers.shutdown()
        for store in self._stores:
            if isinstance(store, DirectRecords):
                store.close()

    def _bring(self, key: int, low: bool) -> None:
        with self.hold(key, low) as held:
            held.wait()

    def _cut(self, n_bytes: int) -> Iterator[slice]:
        for at in range(0, n_bytes, self._read_bytes):
            yield slice(at, min(at + self._read_bytes, n_bytes))

    def _read(self, entry: Entry, job: Job) -> None:
        """Find the entry a place and read it there; by a reading thread."""
        try:
            self._seat(entry)
            pieces = partial(self._pieces, entry, job)
            self._stores[entry.low].read_into(entry.key, self.memory_of(entry), pieces=pieces)
        except Exception as error:
            self._turns.give(job)  # it may have failed in the middle of a piece
            with self._changed:
                entry.error = error
                del self._entries[entry.key, entry.low]
        else:
            self._publish(entry, entry.n_bytes)
        with self._changed:
            self._let_go(entry)
        self._tell(entry)

    def _pieces(self, entry: Entry, job: Job, n_bytes: int) -> Iterator[slice]:
        """The pieces to read it in, each while it has the disk. The last is published later."""
        for piece in self._cut(n_bytes):
            self._turns.take(job)
            yield piece
            if piece.stop < n_bytes:
                self._publish(entry, piece.stop)
                self._tell(entry)
        self._turns.give(job)

    def _publish(self, entry: Entry, readable: int) -> None:
        with self._changed:
            entry.read_s = time.perf_counter()
            entry.readable = readable
            self._changed.notify_all()

    def _tell(self, entry: Entry) -> None:
        """Tell who holds the entry. Not under the lock: they may go on to hold others."""
        with self._changed:
            tells = list(entry.tells)
        for tell in tells:
            tell()

    def _let_go(self, entry: Entry) -> None:
        """One holder less. The lock is held."""
        entry.holders -= 1
        if entry.error is not None and not entry.holders:  # nobody will find it any more
            self._unseat(entry)
        self._changed.notify_all()

    def _seat(self, entry: Entry) -> None:
        """Find a place for a record, when copies have ended if there is none before."""
        while entry.place < 0:
            with self._changed:
                move = self._make_room(entry)
            if move is not None:
                self._move(*move)

    def _make_room(self, entry: Entry) -> tuple[Entry, int] | None:
        """Come nearer to a place for ``entry``, or wait for it; whose record must move, and where.

        Nothing is evicted while moving would do, so that what stays depends on the bytes alone.
        """
        places, other = self._places, not entry.low
        if (place := places.take(entry.low)) is not None:
            entry.place = place
            self._seated[entry.low, place] = entry
        elif (outermost := places.outermost(other)) is not None:
            occupant = self._seated[other, outermost]
            if not occupant.holders:
                occupant.holders, occupant.moving = 1, True
                hole = places.take(other)
                assert hole is not None
                return occupant, hole
            self._changed.wait()
        elif not self._evict():
            self._changed.wait()
        return None

    def _evict(self) -> bool:
        victim = next((entry for entry in self._entries.values() if not entry.holders), None)
        if victim is None:
            return False
        del self._entries[victim.key, victim.low]
        self._unseat(victim)
        return True

    def _unseat(self, entry: Entry) -> None:
        if entry.place >= 0:
            del self._seated[entry.low, entry.place]
            self._places.give_up(entry.low, entry.place)

    def _move(self, entry: Entry, place: int) -> None:
        """Bring a record that nobody holds to another place; who asks for it meanwhile waits."""
        into = self.memory[self._places.at(entry.low, place)]
        np.copyto(into.numpy(), self.memory_of(entry).numpy())  # lets other threads run
        with self._changed:
            self._unseat(entry)
            entry.place, entry.moving = place, False
            self._seated[entry.low, place] = entry
            self._let_go(entry)
        self._tell(entry)


def host_tier(
    records: Records, host_bytes: int | None, copies: int = 1, low: Records | None = None
) -> HostTier:
    """A tier of ``host_bytes``, or with room for all. Each of ``copies`` under way holds a record.

    Raises RunError where that is too little, or more than there is.
    """
    largest = max(records.record_bytes, low.record_bytes if low else 0)
    if host_bytes is not None and host_bytes < copies * largest:
        raise RunError(
            f"{format_bytes(host_bytes)} of host memory hold {host_bytes // largest} experts of "
            f"{format_bytes(largest)}: give --host-memory {copies * largest} (bytes) or more"
        )
    return HostTier(records, host_bytes, low)


def _memory(n_bytes: int) -> torch.Tensor:
    free = free_bytes(torch.device("cpu"))
    try:
        if n_bytes > free:
            raise MemoryError
        return device_memory(n_bytes, torch.device("cpu"))
    except (MemoryError, OSError) as error:
        raise RunError(
            f"the experts take {format_bytes(n_bytes)} of host memory, of which this machine has "
            f"{format_bytes(free)} free: keep only some there (--host-memory), or choose a lower "
            "precision"
        ) from error
