"""Counting forward passes: what policies that weigh age by tokens share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.steps import Step


def count_pass(passes: NDArray[np.int64], step: Step) -> int:
    """Count a forward pass where ``step`` begins one: where the layers start over.

    ``passes`` [2] starts as zeros: the pass in progress, and its latest layer. Returns the pass:
    1 is the first that begins at layer 0.
    """
    if step.layer <= passes[1]:
        passes[0] += 1
    passes[1] = step.layer
    return int(passes[0])
