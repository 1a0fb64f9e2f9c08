"""What policies may look at of a stretch of steps besides their demand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Details(NamedTuple):
    """What policies may look at of a stretch of n steps besides their demand.

    logits     [n, E], or one empty row that stands for every step
    predicted  [n, horizon, E], or the like
    begins_pass, begins_sequence  bool[n]
    row_offsets  int64[n + 1]: the token rows of step i are row_offsets[i]:row_offsets[i + 1] of
    token_ids    int32[R], empty where no policy asks for them
    ids, weights, row_logits  [R, K], [R, K], [R, E] of the gate; no rows where no policy routes
    """

    logits: NDArray[np.float32]
    predicted: NDArray[np.float32]
    begins_pass: NDArray[np.bool_]
    begins_sequence: NDArray[np.bool_]
    row_offsets: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    row_logits: NDArray[np.float32]
