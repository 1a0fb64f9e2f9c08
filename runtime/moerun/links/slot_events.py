"""What keeps copies and compute on the same slot apart."""

from __future__ import annotations

from collections.abc import Sequence

from moerun.links.device import Event


class SlotEvents:
    """Two events of the device for each slot.

    ``copied`` lies behind its copy, and compute waits for it before it reads the slot; ``used``
    lies behind the last compute that read it, and the next copy into the slot waits for it. Both
    waits are the device's: no thread takes part.
    """

    def __init__(self, n_slots: int, born: Event) -> None:
        """``born`` is reached when nothing uses what the memory of the slots was before."""
        self.copied = [born] * n_slots
        self.used = [born] * n_slots

    def grant(self, slots: Sequence[int], born: Event) -> None:
        """These slots have new memory, of which the same is true."""
        more = max(slots) + 1 - len(self.used)
        self.copied += [born] * more
        self.used += [born] * more
        for slot in slots:
            self.used[slot] = born
