"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from moerun.links.base import DualSlot, Records, Slot, ThreadedLink, Throttle
from moerun.links.direct import DirectRecords
from moerun.links.host import HostTier
from moerun.links.turns import Job


class DiskLink(ThreadedLink):
    """Reads records from the store's files, or from a host tier, into slots in host memory.

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
        chunk_bytes: int = 0,
    ) -> None:
        super().__init__(
            slots,
            record_bytes=store.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=torch.device("cpu"),
            low_record_bytes=low.record_bytes if low else 0,
            chunk_bytes=chunk_bytes,
        )
        self._stores = [store, *([low] if low else [])]
        self.tier = store if isinstance(store, HostTier) else None

    def acquire(self, slot: int) -> None:
        """Nothing to do: compute on the CPU runs when it is called."""

    def release(self, slot: int) -> None:
        """Nothing to do: compute on the CPU is over when its call returns."""

    def close(self) -> None:
        super().close()
        for records in self._stores:
            if isinstance(records, DirectRecords | HostTier):  # a store is its opener's
                records.close()

    def copy(self, stream: int, job: Job) -> None:
        into, record = self.destination(stream, job.slot, job.low)
        records = self._stores[job.low]
        if self.chunked:
            records.read_into(job.key, record, pieces=partial(self.pieces, job))
        else:
            records.read_into(job.key, record)
        into.arrive(record)
