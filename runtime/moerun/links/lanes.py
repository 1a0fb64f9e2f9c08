"""What a link needs of a device that works by itself: queues of copies, and marks in them.

The link decides on these alone (`moerun.links.pinned`); CUDA's are in `moerun.links.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in a lane, reached when all that was queued before it is done."""

    def wait(self) -> None:
        """Block this thread until then. Raises what went wrong before it."""


class Lane(Protocol):
    """A queue of the device's work, done in order, beside the work of other lanes.

    Everything returns at once. What cannot be queued raises here, what fails later at a mark.
    """

    def copy(self, into: torch.Tensor, record: torch.Tensor) -> None:
        """Copy bytes, uint8[n], from pinned host memory to the device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` issues."""

    def mark(self) -> Mark:
        """Behind everything queued so far."""

    def after(self, mark: Mark) -> None:
        """What is queued from now on waits for ``mark``, which may be another lane's."""


class Lanes(Protocol):
    """A device's lanes, and the host memory they copy from. Safe to share between threads."""

    @property
    def device(self) -> torch.device:
        """Where the slots lie."""

    @property
    def compute(self) -> Lane:
        """The lane that the model computes in, as issued by the thread that asks."""

    def open(self) -> Lane:
        """A new lane."""

    def pin(self, memory: torch.Tensor) -> None:
        """Page-lock host memory, so that it can be copied from. Raises RunError if refused."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Once ``pin`` is no longer needed."""

    def trim(self) -> None:
        """Give freed memory of the device to other programs."""

    def drain(self) -> None:
        """Block until all that was queued is done."""
