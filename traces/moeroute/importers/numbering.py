"""Sequences and positions of rows whose recorder kept none, from the order of the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.recording import Columns


class Numbering:
    """Fills in the columns `position` and `sequence` of chunks that follow one another.

    Without positions, a row whose layer does not come after the layer before begins a token.
    Without sequences, a token whose position is before the last one's begins a sequence, unless the
    row goes on to a later layer (a prompt recorded a layer at a time).
    """

    def __init__(self) -> None:
        self.made: set[str] = set()
        self._layer: int | None = None
        self._position = -1
        self._sequence = 0

    def fill(self, columns: Columns) -> None:
        """Add the columns that the chunk lacks."""
        layer = columns["layer"].astype(np.int64)
        if not len(layer):
            return
        before = np.append(layer[0] if self._layer is None else self._layer, layer[:-1])
        if "position" not in columns:
            columns["position"] = self._positions(layer, before)
            self.made.add("position")
        position = columns["position"].astype(np.int64)
        if "sequence" not in columns:
            last = position[0] if self._layer is None else self._position
            back = (np.diff(position, prepend=last) < 0) & (layer <= before)
            columns["sequence"] = self._sequence + np.cumsum(back)
            self._sequence = int(columns["sequence"][-1])
            self.made.add("sequence")
        self._layer, self._position = int(layer[-1]), int(position[-1])

    def _positions(self, layer: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
        new = layer <= before
        new[0] |= self._layer is None
        return self._position + np.cumsum(new)
