"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moerun.links.base import Records
from moerun.links.bus import Job, Pieces
from moerun.links.direct import DirectRecords
from moerun.links.host import HostTier
from moerun.links.slot import DualSlot, Slot
from moerun.links.threaded import ThreadedLink
from moerun.links.throttle import Throttle


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
        super().__init__(
            slots,
            self.tier.sizes if self.tier else (store.record_bytes, low.record_bytes if low else 0),
            streams=streams,
            throttle=throttle,
            device=torch.device("cpu"),
            chunk_bytes=chunk_bytes,
        )
        self._stores = [store, *([low] if low else [])]  # by variant

    def want(self, key: int) -> None:
        """Demand a prefetch under way: on the bus, and at the reader of the host tier."""
        super().want(key)
        if self.tier and (job := self._travelling.get(key)) is not None:
            self.tier.want(job)

    def acquire(self, slot: int) -> None:
        """Nothing to do: compute on the CPU runs when it is called."""

    def release(self, slot: int) -> None:
        """Nothing to do: compute on the CPU is over when its call returns."""

    def close(self) -> None:
        """End the threads and close the readers that this link opened."""
        super().close()
        for records in self._stores:
            if isinstance(records, DirectRecords | HostTier):  # a store is its opener's
                records.close()

    def copy(self, stream: int, job: Job, pieces: Pieces | None) -> None:
        """Read the record of ``job`` from the host tier or the store into its slot."""
        into = self._destinations.of(stream, job.slot, job.variant)
        if self.tier is not None:
            self.tier.read_into(job.key, into.landing, pieces=pieces, variant=job.variant, job=job)
        else:
            self._stores[job.variant].read_into(job.key, into.landing, pieces=pieces)
        into.arrive()
