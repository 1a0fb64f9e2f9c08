"""The link of a GPU: records in pinned host memory, copied by their own streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moerun.devices import format_bytes
from moerun.errors import RunError
from moerun.links.base import Slot, ThreadedLink, Throttle
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
        slots: Sequence[Slot],
        device: torch.device,
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        """Pins the tier's memory, and fills it where all records fit. Raises RunError."""
        super().__init__(
            slots,
            record_bytes=tier.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=device,
            chunk_bytes=chunk_bytes,
        )
        self.device = device
        if tier.n_records == tier.n_keys:
            tier.fill()
        _pin(tier)
        self.tier: HostTier | None = tier
        self._copied = [_event() for _ in slots]
        self._used: list[torch.cuda.Event | None] = [None] * len(slots)
        self._lanes = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in self._scratch
        ]

    def acquire(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        event = self._used[slot] or _event()
        event.record(torch.cuda.current_stream(self.device))
        self._used[slot] = event

    def copy(self, stream: int, job: Job) -> None:
        assert self.tier is not None
        lane, slot = self._lanes[stream], job.slot
        if (used := self._used[slot]) is not None:
            lane.wait_event(used)
        held = self.tier.hold(job.key)
        try:
            with torch.cuda.stream(lane):
                record = self.landing(stream, slot)
                for piece in self.pieces(job, len(held)):
                    record[piece].copy_(held[piece], non_blocking=True)
                    if self.chunked:  # the bus is handed on when the piece has crossed it
                        self._copied[slot].record(lane)
                        self._copied[slot].synchronize()
                self.slots[slot].arrive(record)
            self._copied[slot].record(lane)
            self._copied[slot].synchronize()
        finally:
            self.tier.drop(job.key)

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
        if self.tier is not None:
            torch.cuda.synchronize(self.device)
            _unpin(self.tier.memory)
            self.tier.close()
            self.tier = None


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
