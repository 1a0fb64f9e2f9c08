"""How often each expert is used: what calibrates policies, from a trace or a file of counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import PARQUET, Source
from moeroute.importers.counted import describe, read
from moeroute.naming import Place, sha256_of
from moeroute.trace import Trace, find_trace, open_trace


@dataclass(frozen=True)
class UseCounts:
    """Uses of each expert, and the file that tells them."""

    path: Place
    digest: str  # SHA-256 of the file
    counts: NDArray[np.int64]  # [n_layers, n_experts]

    @property
    def n_layers(self) -> int:
        """Layers with experts."""
        return int(self.counts.shape[0])

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return int(self.counts.shape[1])


def uses_of(source: str | Path | Trace) -> UseCounts:
    """The uses that a trace, a sample by name, or a file of counts tells.

    Layers that no token used are no layers with experts. Raises TraceError where the file is
    neither.
    """
    if isinstance(source, Trace):
        return UseCounts(source.path, source.digest, source.expert_counts())
    place = find_trace(source)
    if isinstance(place, Path) and place.is_file():
        file = Source(place, "trace")
        if file.kind != PARQUET and describe(file) is not None:
            counts = read(file)
            return UseCounts(place, sha256_of(place).hex(), counts[counts.sum(axis=1) > 0])
    return uses_of(open_trace(source))
