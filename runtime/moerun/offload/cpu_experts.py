"""Experts computed on the CPU, where their records are kept, while the device computes others."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from moerun.kernels.slots import ExpertSlot, ExpertWeights, SlotForm
from moerun.links import Records

Compute = Callable[[ExpertWeights, torch.Tensor], torch.Tensor]


class HostRecords(Protocol):
    """Records that lie in host memory for good."""

    def record(self, key: int) -> torch.Tensor:
        """uint8[record_bytes], not to be written to."""


class CpuExperts:
    """A worker thread that computes experts, one after the other, in the form of the CPU.

    Records that lie in host memory in that very form are computed where they are; others are
    brought into a slot of the worker's own first.
    """

    def __init__(self, form: SlotForm, records: Records, host: HostRecords | None = None) -> None:
        """``form`` is that of the CPU. Without ``host`` each record is read from ``records``."""
        self._form = form
        self._records = records
        self._host = host
        self._in_place = host is not None and form.slot_bytes == form.record_bytes
        self._slot: ExpertSlot | None = None
        self._buffer: torch.Tensor | None = None
        self._pending: list[Future[torch.Tensor]] = []
        # A thread of its own would take the environment's number of threads, not the run's.
        self._pool = ThreadPoolExecutor(
            1, "cpu-experts", torch.set_num_threads, (torch.get_num_threads(),)
        )

    def expert(self, key: int) -> CpuExpert:
        """``key``, to be computed by the worker."""
        return CpuExpert(self, key)

    def submit(self, key: int, compute: Compute, x: torch.Tensor) -> Future[torch.Tensor]:
        """Have ``compute`` called with the weights of ``key`` and x[T, H], which is on the CPU."""
        inference = torch.is_inference_mode_enabled()

        def work() -> torch.Tensor:
            with torch.inference_mode(inference), torch.no_grad():
                return compute(self._weights(key), x)

        future = self._pool.submit(work)
        self._pending.append(future)
        return future

    def join(self) -> float:
        """Wait for all that was submitted; returns the seconds it took. Raises what a computation
        raised: RunError where a record cannot be read."""
        began_s = time.perf_counter()
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        return time.perf_counter() - began_s

    def drop(self) -> None:
        """Forget what was submitted, once it has come to its end."""
        pending, self._pending = self._pending, []
        for future in pending:
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """End the worker, after what it has begun. Harmless when repeated."""
        self._pool.shutdown(cancel_futures=True)

    def _weights(self, key: int) -> ExpertWeights:
        record = self._host.record(key) if self._host else None
        if record is not None and self._in_place:
            return self._form.bind(record)
        slot = self._own_slot()
        if record is None:
            record = self._own_buffer() if slot.landing is None else slot.landing
            self._records.read_into(key, record)
        slot.arrive(record)
        return slot

    def _own_slot(self) -> ExpertSlot:
        if self._slot is None:
            self._slot = self._form.bind(torch.empty(self._form.slot_bytes, dtype=torch.uint8))
        return self._slot

    def _own_buffer(self) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self._form.record_bytes, dtype=torch.uint8)
        return self._buffer


class CpuExpert:
    """One expert, where ``ExpertWeights`` would be, that another thread computes."""

    def __init__(self, cpu_experts: CpuExperts, key: int) -> None:
        self._cpu_experts = cpu_experts
        self._key = key

    def begin(self, compute: Compute, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start ``compute(weights, x)``; what is returned waits for it and gives its result, on
        another device than the CPU as that one's own compute would: there, and of x's type."""
        future = self._cpu_experts.submit(self._key, compute, x.cpu())
        if x.device.type == "cpu":
            return future.result
        return lambda: future.result().to(x)
