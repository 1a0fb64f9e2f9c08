"""The link of a GPU: records in pinned host memory, copied by their own streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moerun.errors import RunError
from moerun.links.base import DualSlot, Records, Slot, ThreadedLink, Throttle


class CudaLink(ThreadedLink):
    """Copies records from a pinned host arena, which holds them all, into slots on the device.

    Each slot has two events. ``copied`` is recorded behind its copy, and the compute stream waits
    for it before it reads the slot; ``used`` is recorded behind its last kernel, and the next copy
    into the slot waits for it. Nothing else is ever synchronised.
    """

    def __init__(
        self,
        store: Records,
        slots: Sequence[Slot | DualSlot],
        device: torch.device,
        *,
        streams: int = 1,
        throttle: Throttle | None = None,
        low: Records | None = None,
    ) -> None:
        """Loads every record of the store, and of the lower precision's, into pinned memory.

        RunError where they do not fit.
        """
        super().__init__(
            slots,
            record_bytes=store.record_bytes,
            streams=streams,
            throttle=throttle,
            scratch_device=device,
            low_record_bytes=low.record_bytes if low else 0,
        )
        self.device = device
        self._hosts = [_pinned_copy(store)]
        if low:
            try:
                self._hosts.append(_pinned_copy(low))
            except BaseException:
                _unpin(self._hosts[0])
                raise
        self._copied = [_event() for _ in slots]
        self._used: list[torch.cuda.Event | None] = [None] * len(slots)
        self._lanes = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(streams)
        ]

    def record(self, key: int) -> torch.Tensor:
        """The record of ``key`` in host memory, uint8[record_bytes]; not to be written to."""
        return self._hosts[0][key]

    def acquire(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        event = self._used[slot] or _event()
        event.record(torch.cuda.current_stream(self.device))
        self._used[slot] = event

    def copy(self, stream: int, key: int, slot: int, low: bool) -> None:
        lane = self._lanes[stream]
        if (used := self._used[slot]) is not None:
            lane.wait_event(used)
        with torch.cuda.stream(lane):
            into, record = self.destination(stream, slot, low)
            record.copy_(self._hosts[low][key], non_blocking=True)
            into.arrive(record)
        self._copied[slot].record(lane)
        self._copied[slot].synchronize()

    def close(self) -> None:
        super().close()
        if self._hosts:
            torch.cuda.synchronize(self.device)
            while self._hosts:
                _unpin(self._hosts.pop())


def _pinned_copy(store: Records) -> torch.Tensor:
    """All records in page-locked host memory: uint8[n_keys, record_bytes]."""
    n_bytes = store.n_keys * store.record_bytes
    try:
        # Registered rather than allocated pinned: torch's pinned allocator rounds up to a power
        # of two, which for all experts of a model can be as much again.
        host = torch.empty((store.n_keys, store.record_bytes), dtype=torch.uint8)
        for key in range(store.n_keys):
            store.read_into(key, host[key])
        status = int(_runtime().cudaHostRegister(host.data_ptr(), n_bytes, 0))
    except (RuntimeError, MemoryError) as error:
        raise RunError(_no_host_memory(n_bytes)) from error
    if status != 0:
        raise RunError(f"{_no_host_memory(n_bytes)} (CUDA error {status})")
    return host


def _unpin(host: torch.Tensor) -> None:
    _runtime().cudaHostUnregister(host.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _no_host_memory(n_bytes: int) -> str:
    return (
        f"the experts take {n_bytes / 2**30:.2f} GiB of pinned host memory, which this machine "
        "does not give: choose a lower precision"
    )
