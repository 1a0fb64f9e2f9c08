"""The threads that read records into a host tier, from the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from moerun.links.base import Records
from moerun.links.bus import BusArbiter, Job
from moerun.links.direct import DirectRecords

READ_BYTES = 8 << 20
"""The pieces that records are read in: large enough for the disk to have many requests of one at
once, small enough for the link to take up a record long before the last is there."""

_THREADS = 8  # at most: one for each copy that a link may have under way, and to spare


class RecordReaders:
    """Reads one record at a time, the demanded before the guessed (`BusArbiter`).

    What is waited for has all of the disk, and the next record is begun while the last is still
    verified, or crossing to the device.
    """

    def __init__(self, stores: Sequence[Records], read_bytes: int) -> None:
        """``stores`` by variant."""
        self._stores = stores
        self._read_bytes = read_bytes
        self._disk = BusArbiter()
        self._pool = ThreadPoolExecutor(_THREADS, "reader")

    def run(self, work: Callable[[], None]) -> None:
        """Have a reading thread do ``work``, which calls ``read`` and handles its errors."""
        self._pool.submit(work)

    def read(self, job: Job, buffer: torch.Tensor, arrived: Callable[[int], None]) -> None:
        """Fill ``buffer`` with the record of ``job``, in the order of ``rank_of``.

        ``arrived`` is told how many bytes are there, but for the last piece: a record is not there
        before its checksum is verified, and when that is so this returns. Raises what the store
        raises.
        """

        def pieces(n_bytes: int) -> Iterator[slice]:
            for piece in self.cut(n_bytes):
                self._disk.acquire(job)
                yield piece
                if piece.stop < n_bytes:
                    arrived(piece.stop)
            self._disk.release(job)

        try:
            self._stores[job.variant].read_into(job.key, buffer, pieces=pieces)
        finally:
            self._disk.release(job)  # it may have failed in the middle of a piece

    def cut(self, n_bytes: int) -> Iterator[slice]:
        """The pieces of so many bytes."""
        for at in range(0, n_bytes, self._read_bytes):
            yield slice(at, min(at + self._read_bytes, n_bytes))

    def want(self, job: Job) -> None:
        """Treat the prefetch ``job`` as a demand from now on."""
        self._disk.want(job)

    def close(self) -> None:
        """End the threads, and close the stores that are the tier's own. Harmless when repeated."""
        self._pool.shutdown()
        for store in self._stores:
            if isinstance(store, DirectRecords):
                store.close()
