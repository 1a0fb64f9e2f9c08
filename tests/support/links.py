"""Small stores, slots and links, in memory or in one plain file, for what is served over them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from moerun.errors import RunError
from moerun.links import Done, LinkStatistics, Records, Variant, in_form
from moerun.links.arena import Arena
from moerun.links.bus import Pieces

RECORD_BYTES = 4096
N_KEYS = 12
PATIENCE_S = 30.0

Reports = SimpleQueue[tuple[int, Exception | None]]


class FileRecords:
    """Records in one plain file; ``short`` makes the reads of one key fail."""

    record_bytes = RECORD_BYTES
    n_keys = N_KEYS

    def __init__(self, path: Path, short: int = -1) -> None:
        self.path = path
        self.short = short
        path.write_bytes(b"".join(bytes([key + 1]) * RECORD_BYTES for key in range(N_KEYS)))

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        if key == self.short:
            raise RunError(f"expert {key} is cut off in {self.path}")
        for piece in pieces(self.record_bytes) if pieces else (slice(0, self.record_bytes),):
            with self.path.open("rb") as file:
                file.seek(key * self.record_bytes + piece.start)
                file.readinto(buffer[piece].numpy().data)


class LandingSlot:
    def __init__(self) -> None:
        self.landing: torch.Tensor | None = torch.zeros(RECORD_BYTES, dtype=torch.uint8)
        self.arrivals = 0

    def arrive(self, record: torch.Tensor) -> None:
        assert record is self.landing
        self.arrivals += 1


class MemoryRecords:
    """A store in memory: record ``key`` is the key's number, from ``first`` on, all over.
    ``broken`` keys fail: their checksums, when all of them has been read."""

    def __init__(
        self,
        n_keys: int,
        broken: frozenset[int] = frozenset(),
        *,
        record_bytes: int = RECORD_BYTES,
        first: int = 0,
    ) -> None:
        self.n_keys = n_keys
        self.broken = broken
        self.record_bytes = record_bytes
        self.first = first

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        for piece in pieces(self.record_bytes) if pieces else (slice(None),):
            buffer[piece].view(torch.int32).fill_(self.first + key)
        if key in self.broken:
            raise RunError(f"expert {key} in store.safetensors: checksum mismatch")


class MemorySlot:
    def __init__(self) -> None:
        self.landing = torch.zeros(RECORD_BYTES, dtype=torch.uint8)

    def arrive(self, record: torch.Tensor) -> None:
        assert record is self.landing


class ShuffledLink:
    """A link whose copies under way end in random order, after random delays."""

    def __init__(
        self,
        records: Records,
        slots: Sequence[Any],
        streams: int,
        seed: int,
        low: Records | None = None,
    ) -> None:
        self.streams = streams
        self.chunked = False
        self._low = low
        self.statistics = LinkStatistics()
        self.slots = slots
        self._records = records
        self._random = random.Random(seed)
        self._jobs: list[tuple[int, int, Variant]] = []
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self, done: Done) -> None:
        self._done = done
        self._thread.start()

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        with self._wake:
            self._jobs.append((key, slot, variant))
            assert len(self._jobs) <= self.streams
            self._wake.notify()

    def want(self, key: int) -> None: ...

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        assert isinstance(self.slots, Arena)
        self.slots.resize(withdrawn, granted)

    def acquire(self, slot: int) -> None: ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None:
        with self._wake:
            self._open = False
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and self._open:
                    self._wake.wait()
                if not self._jobs:
                    return
            time.sleep(self._random.choice([0.0, 0.0, 1e-5, 2e-4]))
            with self._wake:
                key, slot, variant = self._jobs.pop(self._random.randrange(len(self._jobs)))
            records = self._low if variant is Variant.LOW and self._low else self._records
            into = in_form(self.slots[slot], variant)
            record = into.landing
            if record is None:
                record = torch.empty(records.record_bytes, dtype=torch.uint8)
            records.read_into(key, record)
            into.arrive(record)
            self._done(key, None, time.perf_counter())
