"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from moerun.links.base import DualSlot, Records, Slot, Throttle
from moerun.links.bus import Job
from moerun.links.direct import DirectRecords
from moerun.links.host import HostTier
from moerun.links.threaded import ThreadedLink


class DiskLink(ThreadedLink):
    """Reads records from the store's files, or from a host tier, into slots in host memory.

    Reading releases the interpreter lock, so it overlaps with compute. A read that fails is
    reported with the store's message, which names the expert and the file.
    """

    def __init__(
        self,
        store: Records | HostTier,
        slots: Sequence[Slot | DualSlot],
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        low: Records | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        """``low``: the records of the lower precision; a host tier has its own."""
        self.tier = store if isinstance(store, HostTier) else None
        low_bytes = low.record_bytes if low else self.tier.low_record_bytes if self.tier else 0
        super().__init__(
            slots,
            record_bytes=store.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=torch.device("cpu"),
            low_record_bytes=low_bytes,
            chunk_bytes=chunk_bytes,
        )
        self._stores = [store, *([low] if low else [])]

    def want(self, key: int) -> None:
        super().want(key)
        if self.tier and (job := self._travelling.get(key)) is not None:
            self.tier.want(job)

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
        pieces = partial(self.pieces, job) if self.chunked else None
        if self.tier is not None:
            self.tier.read_into(job.key, record, pieces=pieces, low=job.low, job=job)
        else:
            self._stores[job.low].read_into(job.key, record, pieces=pieces)
        into.arrive(record)
