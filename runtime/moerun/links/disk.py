"""The link of a machine without a GPU: reader threads bring records from the store into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moerun.links.base import Records, Slot, ThreadedLink, Throttle
from moerun.links.direct import DirectRecords
from moerun.links.host import HostTier


class DiskLink(ThreadedLink):
    """Reads records from the store's files, or from a host tier, into slots in host memory.

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
        super().__init__(
            slots,
            record_bytes=store.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=torch.device("cpu"),
        )
        self._records = store

    def acquire(self, slot: int) -> None:
        """Nothing to do: compute on the CPU runs when it is called."""

    def release(self, slot: int) -> None:
        """Nothing to do: compute on the CPU is over when its call returns."""

    def close(self) -> None:
        super().close()
        if isinstance(self._records, DirectRecords | HostTier):  # a store is its opener's
            self._records.close()

    def copy(self, stream: int, key: int, slot: int) -> None:
        record = self.landing(stream, slot)
        self._records.read_into(key, record)
        self.slots[slot].arrive(record)
