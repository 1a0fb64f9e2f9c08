"""The link of a GPU: records in pinned host memory, copied by their own streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moerun.devices import format_bytes
from moerun.errors import RunError
from moerun.links.base import DualSlot, Slot, ThreadedLink, Throttle
from moerun.links.host import HostTier
from moerun.links.turns import Job


class CudaLink(ThreadedLink):
    """Copies records from pinned host memory, which holds all or some, into slots on the device.

    Each slot has two events. ``copied`` is recorded behind its copy, and the compute stream waits
    for it before it reads the slot; ``used`` is recorded behind its last kernel, and the next copy
    into the slot waits for it. Nothing else is ever synchronised.
    """

    def __init__(
        self,
        tier: HostTier,
        slots: Sequence[Slot | DualSlot],
        device: torch.device,
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        low: HostTier | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        """Pins the memory of the tier, and of the lower precision's, and fills them where all
        records fit. Raises RunError."""
        super().__init__(
            slots,
            record_bytes=tier.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=device,
            low_record_bytes=low.record_bytes if low else 0,
            chunk_bytes=chunk_bytes,
        )
        self.device = device
        self._tiers: list[HostTier] = []
        for each in (tier, low):
            if each is not None:
                self._pin(each)
        self._copied = [_event() for _ in slots]
        self._used: list[torch.cuda.Event | None] = [None] * len(slots)
        self._lanes = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in self._scratch
        ]

    def record(self, key: int) -> torch.Tensor:
        """The record of ``key`` in host memory, uint8[record_bytes]; not to be written to."""
        tier = self._tiers[0]
        assert tier.n_records == tier.n_keys, "not all records are there"
        return tier.memory[key]

    @property
    def tier(self) -> HostTier | None:
        return self._tiers[0] if self._tiers else None

    def acquire(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        event = self._used[slot] or _event()
        event.record(torch.cuda.current_stream(self.device))
        self._used[slot] = event

    def copy(self, stream: int, job: Job) -> None:
        lane, slot, tier = self._lanes[stream], job.slot, self._tiers[job.low]
        if (used := self._used[slot]) is not None:
            lane.wait_event(used)
        held = tier.hold(job.key)
        try:
            with torch.cuda.stream(lane):
                into, record = self.destination(stream, slot, job.low)
                for piece in self.pieces(job, len(held)):
                    record[piece].copy_(held[piece], non_blocking=True)
                    if self.chunked:  # the bus is handed on when the piece has crossed it
                        self._copied[slot].record(lane)
                        self._copied[slot].synchronize()
                into.arrive(record)
            self._copied[slot].record(lane)
            self._copied[slot].synchronize()
        finally:
            tier.drop(job.key)

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        for slot in withdrawn:
            if (used := self._used[slot]) is not None:
                used.synchronize()
        try:
            super().resize(withdrawn, granted)
        finally:
            if withdrawn:
                torch.cuda.empty_cache()  # or torch would keep it from other programs
        for slot in granted:
            self._copied += [_event() for _ in range(slot + 1 - len(self._copied))]
            self._used += [None] * (slot + 1 - len(self._used))
            # Kernels issued earlier may still use what this memory was before.
            self.release(slot)

    def close(self) -> None:
        super().close()
        if self._tiers:
            torch.cuda.synchronize(self.device)
            self._unpin_all()

    def _pin(self, tier: HostTier) -> None:
        try:
            if tier.n_records == tier.n_keys:
                tier.fill()
            _pin(tier)
        except BaseException:
            self._unpin_all()
            raise
        self._tiers.append(tier)

    def _unpin_all(self) -> None:
        while self._tiers:
            tier = self._tiers.pop()
            _unpin(tier.memory)
            tier.close()


def _pin(tier: HostTier) -> None:
    """Page-lock a tier's memory."""
    # Registered rather than allocated pinned: torch's pinned allocator rounds up to a power of
    # two, which for all experts of a model can be as much again.
    status = int(_runtime().cudaHostRegister(tier.memory.data_ptr(), tier.memory.nbytes, 0))
    if status != 0:
        raise RunError(
            f"the experts take {format_bytes(tier.memory.nbytes)} of pinned host memory, which "
            f"this machine does not give (CUDA error {status}): keep only some there "
            "(--host-memory), or choose a lower precision"
        )


def _unpin(host: torch.Tensor) -> None:
    _runtime().cudaHostUnregister(host.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
