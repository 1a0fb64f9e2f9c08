"""What a record lands in: slots on the device, each for one variant of an expert at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from moerun.links.arena import device_memory


class Variant(IntEnum):
    """Which of an expert's two records: the store's, or the one of the lower precision."""

    FULL = 0
    LOW = 1


Sizes = tuple[int, int]
"""Bytes of a record by ``Variant``; 0 for a lower precision that there is none of."""


class Slot(Protocol):
    """Memory on the device that experts come and go in."""

    @property
    def landing(self) -> torch.Tensor | None:
        """Where a record is to land, uint8[record_bytes]; None: it must land elsewhere first."""

    def arrive(self, record: torch.Tensor) -> None:
        """Make the expert whose record is in ``record`` computable; work on the current stream."""


class DualSlot(NamedTuple):
    """Memory for an expert of either variant, one at a time, in the form of each."""

    full: Slot
    low: Slot


def in_form(slot: Slot | DualSlot, variant: Variant) -> Slot:
    """The slot as an expert of this variant is computed from it."""
    if isinstance(slot, DualSlot):
        return slot[variant]
    return slot


@dataclass(frozen=True, slots=True)
class Destination:
    """A slot, and the memory that a record for it lands in: uint8[record_bytes]."""

    slot: Slot
    landing: torch.Tensor

    def arrive(self) -> None:
        """Make the expert that has landed computable."""
        self.slot.arrive(self.landing)


class Destinations:
    """The slots of a link, and memory of each of its streams for records that cannot land there."""

    def __init__(
        self,
        slots: Sequence[Slot | DualSlot],
        sizes: Sizes,
        *,
        n_streams: int,
        device: torch.device,
    ) -> None:
        """``device`` is where records that cannot land in their slots lie first."""
        self._slots = slots
        self._sizes = sizes
        scratch_bytes = max(
            sizes[variant] if slots and in_form(slots[0], variant).landing is None else 0
            for variant in Variant
        )
        self._scratch = [device_memory(max(scratch_bytes, 1), device) for _ in range(n_streams)]

    def of(self, stream: int, slot: int, variant: Variant) -> Destination:
        """Where a record that travels over ``stream`` into ``slot`` is to land."""
        into = in_form(self._slots[slot], variant)
        if into.landing is not None:
            return Destination(into, into.landing)
        return Destination(into, self._scratch[stream][: self._sizes[variant]])
