"""What a link needs of a device that works by itself: streams of copies, and events in them.

The link decides on these alone (`moerun.links.pinned`); CUDA's are in `moerun.links.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class StreamEvent(Protocol):
    """A point in a stream, reached when all that was queued before it is done."""

    def wait(self) -> None:
        """Block this thread until then. Raises what went wrong before it."""


class Stream(Protocol):
    """A queue of the device's work, done in order, at the same time as that of other streams.

    Everything returns at once. What cannot be queued raises here, what fails later at an event.
    """

    def copy(self, into: torch.Tensor, record: torch.Tensor) -> None:
        """Copy bytes, uint8[n], from pinned host memory to the device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` issues."""

    def record_event(self) -> StreamEvent:
        """An event behind everything queued so far."""

    def wait_event(self, event: StreamEvent) -> None:
        """What is queued from now on waits for ``event``, which may be another stream's."""


class Device(Protocol):
    """A device's streams, and the host memory they copy from. Safe to share between threads."""

    @property
    def torch_device(self) -> torch.device:
        """The torch device that the slots are on."""

    @property
    def compute(self) -> Stream:
        """The stream that the model computes in, as issued by the thread that asks."""

    def new_stream(self) -> Stream:
        """Another stream, for copies."""

    def pin(self, memory: torch.Tensor) -> None:
        """Page-lock host memory, so that it can be copied from. Raises RunError if refused."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo ``pin``: let host memory be pageable again."""

    def trim(self) -> None:
        """Give freed memory of the device to other programs."""

    def synchronize(self) -> None:
        """Block until all that was queued is done."""
