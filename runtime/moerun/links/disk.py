"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from moerun.errors import RunError
from moerun.links.base import (
    Done,
    LinkStatistics,
    LinkThreads,
    Records,
    Slot,
    Throttle,
    check_streams,
)
from moerun.store import ExpertStore


class ColdRecords:
    """A store whose records never stay in the page cache.

    So a machine with memory to spare reads as one does whose memory is too small for the model.
    """

    def __init__(self, store: ExpertStore) -> None:
        """Raises RunError where the system gives no say over its page cache."""
        if not hasattr(os, "posix_fadvise"):
            raise RunError("this system does not let a program read past its cache: leave --cold")
        self.n_keys = store.n_keys
        self.record_bytes = store.record_bytes
        self._store = store

    def read_into(self, key: int, buffer: torch.Tensor) -> None:
        self._store.read_into(key, buffer)
        where = self._store.location(key)
        fd = os.open(where.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, where.offset, where.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class DiskLink:
    """Reads records from the store's files into slots in host memory.

    Reading releases the interpreter lock, so it overlaps with compute. A read that fails is
    reported with the store's message, which names the expert and the file.
    """

    def __init__(
        self,
        store: Records,
        slots: Sequence[Slot],
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
    ) -> None:
        self.streams = check_streams(streams)
        self.statistics = LinkStatistics()
        self._store = store
        self.slots = slots
        self._scratch = [
            torch.empty(store.record_bytes if slots[0].landing is None else 0, dtype=torch.uint8)
            for _ in range(streams)
        ]
        self._threads = LinkThreads(
            streams,
            self._read,
            self.statistics,
            record_bytes=store.record_bytes,
            throttle=throttle,
        )

    def start(self, done: Done) -> None:
        self._threads.start(done)

    def submit(self, key: int, slot: int) -> None:
        self._threads.submit(key, slot)

    def acquire(self, slot: int) -> None:
        """Nothing to do: compute on the CPU runs when it is called."""

    def release(self, slot: int) -> None:
        """Nothing to do: compute on the CPU is over when its call returns."""

    def close(self) -> None:
        self._threads.close()

    def _read(self, stream: int, key: int, slot: int) -> None:
        landing = self.slots[slot].landing
        record = self._scratch[stream] if landing is None else landing
        self._store.read_into(key, record)
        self.slots[slot].arrive(record)
