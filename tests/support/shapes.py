"""Experts' shapes without a model."""

from __future__ import annotations

import torch
from moerun.format.expert import ExpertParam, ExpertShape


def gated_expert(hidden: int, inner: int) -> ExpertShape:
    """An expert of Mixtral's kind in bfloat16: gate and up stacked, and down."""
    return ExpertShape(
        (
            ExpertParam("gate_up_proj", (2 * inner, hidden), torch.bfloat16),
            ExpertParam("down_proj", (hidden, inner), torch.bfloat16),
        )
    )
