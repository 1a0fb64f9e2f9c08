"""A rig around the link of a GPU: small records, slots of either precision, a device of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from moerun.links import DualSlot, HostTier, Records, Variant, in_form
from moerun.links.arena import Arena, device_memory
from moerun.links.bus import Pieces
from moerun.links.pinned import PinnedLink

from support.links import MemoryRecords
from support.thread_device import PATIENCE_S, Span, ThreadDevice

CHUNK = 4096
RECORD = 4 * CHUNK
LOW = 2 * CHUNK
FIRST_LOW = 1000
N_KEYS = 8

Reports = SimpleQueue[tuple[int, Exception | None]]


class Form:
    """A slot's memory as one precision uses it; with ``derives`` records land elsewhere first."""

    def __init__(self, memory: torch.Tensor, derives: bool = False) -> None:
        self.memory = memory
        self.landing = None if derives else memory

    def arrive(self, record: torch.Tensor) -> None:
        if self.landing is None:
            self.memory.copy_(record)

    def holds(self, number: int) -> bool:
        return bool((self.memory.view(torch.int32) == number).all())


def dual_slot(derives: bool = False) -> DualSlot:
    memory = device_memory(RECORD, torch.device("cpu"))
    return DualSlot(Form(memory, derives), Form(memory[:LOW], derives))


def full_records(broken: frozenset[int] = frozenset()) -> MemoryRecords:
    return MemoryRecords(N_KEYS, broken, record_bytes=RECORD)


def low_records() -> MemoryRecords:
    return MemoryRecords(N_KEYS, record_bytes=LOW, first=FIRST_LOW)


class SteppedRecords(MemoryRecords):
    """Pieces are read only as ``allow`` lets them; ``log`` has those begun."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        super().__init__(N_KEYS, broken, record_bytes=RECORD)
        self.log: list[tuple[int, int]] = []
        self._allowed = threading.Semaphore(0)

    def allow(self, pieces: int) -> None:
        self._allowed.release(pieces)

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        def stepped(n_bytes: int) -> Iterator[slice]:
            assert pieces is not None
            for piece in pieces(n_bytes):
                self.log.append((key, piece.start // CHUNK))
                assert self._allowed.acquire(timeout=PATIENCE_S)
                yield piece

        super().read_into(key, buffer, pieces=stepped)


class Rig:
    """A started link over a tier of ``n_bytes``, with four slots, and what it reports."""

    def __init__(
        self,
        records: Records,
        *,
        n_bytes: int | None = None,
        device: ThreadDevice | None = None,
        low: Records | None = None,
        derives: bool = False,
        n_slots: int = 4,
        **options: Any,
    ) -> None:
        self.device = device or ThreadDevice()
        self.slots = Arena(partial(dual_slot, derives), n_slots)
        self.tier = HostTier(records, n_bytes, low, read_bytes=CHUNK)
        self.link = PinnedLink(self.tier, self.slots, self.device, **options)
        self.reports: Reports = SimpleQueue()
        self.link.start(lambda key, error, _ended_s: self.reports.put((key, error)))

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        self.device.end()
        assert self.device.pinned == []

    def wait(self) -> int:
        key, error = self.reports.get(timeout=PATIENCE_S)
        assert error is None
        return key

    def check(self, slot: int, number: int) -> Callable[[], None]:
        """Have compute look whether a slot holds ``number``; what is returned waits and tells."""
        found: list[bool] = []
        self.link.acquire(slot)
        form = in_form(self.slots[slot], Variant(number >= FIRST_LOW))
        assert isinstance(form, Form)
        self.device.compute.run(lambda: found.append(form.holds(number)))
        self.link.release(slot)
        event = self.device.compute.record_event()

        def told() -> None:
            event.wait()
            assert found == [True]

        return told

    @property
    def queued(self) -> list[tuple[int, int]]:
        """The pieces queued so far: slot and number."""
        return [self._piece(span) for span in list(self.device.queued)]

    def _piece(self, span: Span) -> tuple[int, int]:
        for slot, memory in enumerate(self.slots):
            offset = span.address - memory.full.memory.data_ptr()
            if 0 <= offset < RECORD:
                return slot, offset // CHUNK
        raise AssertionError(span)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
