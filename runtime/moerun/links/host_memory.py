"""The memory of a host tier: what is held there, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from moerun.amounts import format_bytes
from moerun.devices import free_bytes
from moerun.errors import RunError
from moerun.format.names import RECORD_ALIGN
from moerun.links.arena import device_memory
from moerun.links.slot import Sizes, Variant
from moerun.links.two_sizes import TwoSizeAllocator


class Readable(NamedTuple):
    """How much of a record is there."""

    n_bytes: int  # from its start on; all of them only when their checksum is verified
    read_s: float  # when the last of these came (time.perf_counter); 0.0 if there are none


NOTHING_READ = Readable(0, 0.0)


@dataclass(eq=False, slots=True)
class Entry:
    """One record. ``holders`` counts copies under way from it, its read and its move."""

    key: int
    variant: Variant
    n_bytes: int
    block: int = -1  # none yet
    readable: Readable = NOTHING_READ
    holders: int = 1
    moving: bool = False
    error: Exception | None = None
    listeners: list[Callable[[], None]] = field(default_factory=list)


class Move(NamedTuple):
    """A record that is being brought to another block, so that its own becomes free."""

    entry: Entry
    block: int


class RecordMemory:
    """One stretch of memory, and which record lies in which block of it.

    Only ``view`` and ``copy`` may be called by several threads at once.
    """

    def __init__(self, n_bytes: int, sizes: Sizes, *, aligned: bool) -> None:
        """With ``aligned`` every record of aligned size begins at an aligned address. Raises
        RunError where there is not so much memory."""
        self.memory = _host_memory(n_bytes)
        assert n_bytes >= max(sizes)
        usable = n_bytes // RECORD_ALIGN * RECORD_ALIGN if aligned else n_bytes
        self._allocator = TwoSizeAllocator(usable, sizes)
        self._occupants: dict[tuple[Variant, int], Entry] = {}

    def view(self, entry: Entry) -> torch.Tensor:
        """uint8[n_bytes] of an entry that has a block."""
        return self.memory[self._allocator.span(entry.variant, entry.block)]

    def place(self, entry: Entry) -> bool:
        """Give ``entry`` a block, if there is one; whether there was."""
        block = self._allocator.allocate(entry.variant)
        if block is None:
            return False
        entry.block = block
        self._occupants[entry.variant, block] = entry
        return True

    def remove(self, entry: Entry) -> None:
        """Free the block of ``entry``, if ``entry`` has one."""
        if entry.block >= 0:
            del self._occupants[entry.variant, entry.block]
            self._allocator.free(entry.variant, entry.block)
            entry.block = -1

    def in_the_way(self, variant: Variant) -> Entry | None:
        """The record of the other variant that would leave more for ``variant`` if it moved."""
        other = Variant.LOW if variant is Variant.FULL else Variant.FULL
        outermost = self._allocator.outermost(other)
        return None if outermost is None else self._occupants[other, outermost]

    def begin_move(self, entry: Entry) -> Move:
        """Reserve another block for what is ``in_the_way``. Then ``copy``, then ``end_move``."""
        block = self._allocator.allocate(entry.variant)
        assert block is not None
        return Move(entry, block)

    def copy(self, move: Move) -> None:
        """Copy the bytes; nobody may be using the record. Lets other threads run."""
        into = self.memory[self._allocator.span(move.entry.variant, move.block)]
        np.copyto(into.numpy(), self.view(move.entry).numpy())

    def end_move(self, move: Move) -> None:
        """The record lies in its new block, and its old one is free."""
        entry, block = move
        self.remove(entry)
        entry.block = block
        self._occupants[entry.variant, block] = entry


def _host_memory(n_bytes: int) -> torch.Tensor:
    free = free_bytes(torch.device("cpu"))
    try:
        if n_bytes > free:
            raise MemoryError
        return device_memory(n_bytes, torch.device("cpu"))
    except (MemoryError, OSError) as error:
        raise RunError(
            f"the experts take {format_bytes(n_bytes)} of host memory, of which this machine has "
            f"{format_bytes(free)} free: keep only some there (--host-memory), or choose a lower "
            "precision"
        ) from error
