"""CUDA's streams, events and pinned memory, as a link uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moerun.amounts import format_bytes
from moerun.errors import RunError
from moerun.links.device import StreamEvent


class CudaEvent:
    """An event of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream = stream
        self.event.record(stream)

    def wait(self) -> None:
        """Block this thread until the event is reached; RunError if the work before it failed."""
        with _naming(self._stream.device):
            self.event.synchronize()


class CudaStream:
    """A stream of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, into: torch.Tensor, record: torch.Tensor) -> None:
        """Queue a copy of bytes, uint8[n], from pinned host memory to the device."""
        with _naming(self._stream.device), torch.cuda.stream(self._stream):
            into.copy_(record, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        """Queue the kernels that ``work`` launches."""
        with _naming(self._stream.device), torch.cuda.stream(self._stream):
            work()

    def record_event(self) -> CudaEvent:
        """An event behind all that is queued in this stream now."""
        with _naming(self._stream.device):
            return CudaEvent(self._stream)

    def wait_event(self, event: StreamEvent) -> None:
        """Let what is queued from now on wait for ``event``."""
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)


class CudaDevice:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    @property
    def compute(self) -> CudaStream:
        """The stream that this thread computes on."""
        return CudaStream(torch.cuda.current_stream(self.torch_device))

    def new_stream(self) -> CudaStream:
        """A further stream, which runs at the same time as the others."""
        return CudaStream(torch.cuda.Stream(self.torch_device))  # type: ignore[no-untyped-call]

    def pin(self, memory: torch.Tensor) -> None:
        """Pin host memory, so that copies from it are asynchronous. RunError if that fails."""
        # Registered rather than allocated pinned: torch's pinned allocator rounds up to a power of
        # two, which for all experts of a model can be as much again.
        with torch.cuda.device(self.torch_device):  # or another one would be initialised for it
            status = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if status != 0:
            raise RunError(
                f"the experts take {format_bytes(memory.nbytes)} of pinned host memory, which "
                f"this machine does not give (CUDA error {status}): keep only some there "
                "(--host-memory), or choose a lower precision"
            )

    def unpin(self, memory: torch.Tensor) -> None:
        """Let host memory be pageable again."""
        with torch.cuda.device(self.torch_device):
            _runtime().cudaHostUnregister(memory.data_ptr())

    def trim(self) -> None:
        """Return the memory that torch's allocator keeps unused to the device."""
        torch.cuda.empty_cache()  # or torch would keep it from other programs

    def synchronize(self) -> None:
        """Block this thread until all streams have done their work."""
        torch.cuda.synchronize(self.torch_device)


@contextmanager
def _naming(device: torch.device) -> Iterator[None]:
    """Turns CUDA's errors into one line that says what was under way."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"copying an expert to {device} failed: {reason}") from error


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
