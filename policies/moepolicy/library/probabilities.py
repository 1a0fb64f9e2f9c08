"""What a gate's logits say: probabilities, and whether a later layer was predicted at all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moepolicy.steps import Step


def softmax(logits: NDArray[np.float32], out: NDArray[np.float64]) -> bool:
    """Write the probabilities of ``logits`` [n_experts] into ``out``; False where they are NaN."""
    most = float(logits[0])
    for e in range(len(logits)):
        if math.isnan(float(logits[e])):
            return False
        most = max(most, float(logits[e]))
    total = 0.0
    for e in range(len(logits)):
        out[e] = math.exp(float(logits[e]) - most)
        total += out[e]
    for e in range(len(logits)):
        out[e] /= total
    return True


def is_predicted(step: Step, ahead: int) -> bool:
    """Whether the gate of the layer ``ahead`` + 1 after the step's has been predicted."""
    return ahead < step.predicted.shape[0] and not np.isnan(step.predicted[ahead, 0])
