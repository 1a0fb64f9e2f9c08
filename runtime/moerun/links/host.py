"""The middle of three tiers: a cache of records in host memory between the disk and a device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from moerun.arena import device_memory
from moerun.devices import format_bytes, free_bytes
from moerun.errors import RunError
from moerun.links.base import Records
from moerun.links.direct import DirectRecords
from moerun.links.turns import Pieces


@dataclass
class Entry:
    """One record's place. ``holders`` counts copies under way from it."""

    place: int
    ready: bool = False
    holders: int = 0


class HostTier:
    """The records used last, in host memory; others are read when they are asked for.

    Least recently used goes first, as in the simulator's host cache; the order is that in which
    copies begin. Safe to share between threads: one that wants a record another is reading waits
    for it, and one for which there is no place waits until a copy has ended.
    """

    def __init__(self, records: Records, n_records: int) -> None:
        """Memory for ``n_records``, not yet filled. Raises RunError where there is not so much."""
        self.n_keys = records.n_keys
        self.record_bytes = records.record_bytes
        self.n_records = min(n_records, records.n_keys)
        self.hits = 0
        self.reads = 0
        self._records = records
        n_bytes = self.n_records * records.record_bytes
        self.memory = _memory(n_bytes).view(self.n_records, records.record_bytes)
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # by key, least recent first
        self._free = list(range(self.n_records))[::-1]
        self._changed = threading.Condition()

    def fill(self) -> None:
        """Read as many records as there is room for, by key; raises RunError for damaged ones."""
        for key in range(self.n_records):
            self.hold(key)
            self.drop(key)
        self.hits = self.reads = 0

    def hold(self, key: int) -> torch.Tensor:
        """The record, uint8[record_bytes], which stays where it is until ``drop``.

        Returns when it is there; the errors of reading it name expert and file.
        """
        with self._changed:
            entry = self._find_or_admit(key)
            entry.holders += 1
            if entry.ready:
                self.hits += 1
                return self.memory[entry.place]
            self.reads += 1
        try:
            self._records.read_into(key, self.memory[entry.place])
        except BaseException:
            with self._changed:
                del self._entries[key]
                self._free.append(entry.place)
                self._changed.notify_all()
            raise
        with self._changed:
            entry.ready = True
            self._changed.notify_all()
        return self.memory[entry.place]

    def drop(self, key: int) -> None:
        with self._changed:
            self._entries[key].holders -= 1
            self._changed.notify_all()

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        """Copy a record out: so a link that takes records from a store takes them from here."""
        record = self.hold(key)
        try:
            for piece in pieces(len(record)) if pieces else (slice(None),):
                buffer[piece].copy_(record[piece])
        finally:
            self.drop(key)

    def close(self) -> None:
        """Close what this tier reads from, if that is its own. Harmless when repeated."""
        if isinstance(self._records, DirectRecords):
            self._records.close()

    def _find_or_admit(self, key: int) -> Entry:
        """The entry of ``key``, now the most recent: ready, or a new one to be read into."""
        while True:
            entry = self._entries.get(key)
            if entry is None and (place := self._take_place()) is not None:
                entry = self._entries[key] = Entry(place)
                return entry
            if entry is not None and entry.ready:
                self._entries.move_to_end(key)
                return entry
            self._changed.wait()

    def _take_place(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = next((key for key, entry in self._entries.items() if not entry.holders), None)
        return None if victim is None else self._entries.pop(victim).place


def host_tier(records: Records, host_bytes: int | None, copies: int = 1) -> HostTier:
    """A tier of ``host_bytes``, or with room for all. Each of ``copies`` under way holds a record.

    Raises RunError where that is too little, or more than there is.
    """
    record_bytes = records.record_bytes
    n_records = records.n_keys if host_bytes is None else host_bytes // record_bytes
    if n_records < copies:
        raise RunError(
            f"{format_bytes(host_bytes or 0)} of host memory hold {n_records} experts of "
            f"{format_bytes(record_bytes)}: give --host-memory {copies * record_bytes} (bytes) "
            "or more"
        )
    return HostTier(records, n_records)


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
