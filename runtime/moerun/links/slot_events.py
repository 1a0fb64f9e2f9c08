"""What keeps copies and compute on the same slot apart."""

from __future__ import annotations

from collections.abc import Sequence

from moerun.links.device import StreamEvent


class SlotEvents:
    """Two events of the device for each slot.

    ``copied`` lies behind its copy, and compute waits for it before it reads the slot; ``used``
    lies behind the last compute that read it, and the next copy into the slot waits for it. Both
    waits are the device's: no thread takes part.
    """

    def __init__(self, n_slots: int, memory_free: StreamEvent) -> None:
        """``memory_free`` is reached when nothing uses what the memory of the slots was before."""
        self.copied = [memory_free] * n_slots
        self.used = [memory_free] * n_slots

    def grant(self, slots: Sequence[int], memory_free: StreamEvent) -> None:
        """Give these slots, which have new memory, events of their own."""
        more = max(slots) + 1 - len(self.used)
        self.copied += [memory_free] * more
        self.used += [memory_free] * more
        for slot in slots:
            self.used[slot] = memory_free
