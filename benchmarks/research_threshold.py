"""foresight-spec with a fixed chance from which on a guess is fetched: what it is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import Context
from moepolicy.library.learned.foresight_fetch import among_first
from moepolicy.library.learned.foresight_spec import AHEAD, ForesightSpec
from numpy.typing import NDArray


class FixedThreshold(ForesightSpec):
    """Fetches every guess whose chance is more than ``p``, the likeliest first."""

    def __init__(
        self, context: Context, p: float = 0.5, params: dict[str, NDArray[Any]] | None = None
    ) -> None:
        super().__init__(context, params=params)
        self.p = float(p)

    def wants_predictions(self, layer: int) -> bool:
        """Always: a fixed chance knows nothing of what asking takes."""
        return True

    def best(self, layer: int, begins: float, taken: NDArray[np.int32]) -> int:
        """The likeliest guess; -1 where none is likely enough."""
        found, most = -1, self.p
        for ahead in range(min(AHEAD, self.n_layers - 1 - layer)):
            later = layer + 1 + ahead
            for i in range(self.n_open[ahead, later]):
                key = int(self.open[ahead, later, i])
                chance = self.chance(ahead, later, self.bin[ahead, later, i])
                if chance > most and not among_first(taken, key):
                    found, most = key, chance
        return found
