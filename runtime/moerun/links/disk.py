"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from moerun.errors import RunError
from moerun.links.base import DualSlot, Records, Slot, ThreadedLink, Throttle
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


class DiskLink(ThreadedLink):
    """Reads records from the store's files into slots in host memory.

    Reading releases the interpreter lock, so it overlaps with compute. A read that fails is
    reported with the store's message, which names the expert and the file.
    """

    def __init__(
        self,
        store: Records,
        slots: Sequence[Slot | DualSlot],
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        low: Records | None = None,
    ) -> None:
        super().__init__(
            slots,
            record_bytes=store.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=torch.device("cpu"),
            low_record_bytes=low.record_bytes if low else 0,
        )
        self._stores = [store, *([low] if low else [])]

    def acquire(self, slot: int) -> None:
        """Nothing to do: compute on the CPU runs when it is called."""

    def release(self, slot: int) -> None:
        """Nothing to do: compute on the CPU is over when its call returns."""

    def copy(self, stream: int, key: int, slot: int, low: bool) -> None:
        into, record = self.destination(stream, slot, low)
        self._stores[low].read_into(key, record)
        into.arrive(record)
