"""Bytes of a model's dense weights by name, for the one description of a model's sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from moerun.format.tensorfile import bytes_of


def dense_bytes(model: Any, dtype: torch.dtype, layers: Sequence[str]) -> dict[str, int]:
    """Bytes of every weight but those of the routed experts, whose modules ``layers`` names.

    As a checkpoint in ``dtype`` has them, whatever the model runs in: what transformers keeps in
    float32 stays so, and a tied head is none of its own.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    kept = [(re.compile(glob.replace("*", ".*")), always) for glob, always in plan.items()]
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    experts = tuple(f"{name}." for name in layers)
    sizes = {}
    for name, tensor in model.state_dict().items():
        if name in tied or name.startswith(experts):
            continue
        own = dtype if tensor.is_floating_point() else tensor.dtype
        of = next((always for pattern, always in kept if pattern.search(name)), own)
        sizes[name] = bytes_of(of, tuple(tensor.shape))
    return sizes
