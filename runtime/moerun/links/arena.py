"""The memory that expert slots live in: each slot's is its own, so that what a smaller budget
takes away really goes back."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch

from moerun.amounts import format_bytes
from moerun.devices import who_holds
from moerun.errors import RunError

HUGE_BYTES = 4 << 20  # from here on the system may use huge pages


class Arena(Sequence[Any]):
    """Numbered slots that come and go; each has its memory from ``grant`` to ``withdraw``."""

    def __init__(self, make_slot: Callable[[], Any], n_slots: int) -> None:
        """``make_slot`` gives a slot in fresh memory, or raises RunError."""
        self._make_slot = make_slot
        self._slots: list[Any] = [make_slot() for _ in range(n_slots)]

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._slots[index]

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        """Free the memory of some slots, then give some theirs; RunError if it is not there.

        Then none of the new ones has any. Nothing may be using the slots that go.
        """
        for slot in withdrawn:
            self._slots[slot] = None
        self._slots += [None] * (max(granted, default=-1) + 1 - len(self._slots))
        try:
            for slot in granted:
                self._slots[slot] = self._make_slot()
        except RunError:
            for slot in granted:
                self._slots[slot] = None
            raise


@contextlib.contextmanager
def lacking(slot_bytes: int, device: torch.device) -> Iterator[None]:
    """Turns a lack of memory for a slot into a RunError that says who holds it."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        raise RunError(
            f"an expert slot takes {format_bytes(slot_bytes)}, which {device} does not have "
            f"free{who_holds(device)}: use fewer slots, less --memory or a lower precision"
        ) from error


def device_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory that goes back when its last tensor does: uint8[n_bytes], aligned to 4096 bytes
    on the host."""
    with torch.inference_mode(False):  # or only generating threads could ever write to it
        return _new_memory(n_bytes, device)


def _new_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    # Mapped, not from malloc, which keeps what is freed.
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
