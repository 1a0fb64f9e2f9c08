"""Bytes of a model's dense weights by name, for the description of a model's sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from moeroute.families import family_of

from moerun.format.tensorfile import bytes_of


def dense_bytes(model: Any, dtype: torch.dtype, layers: Sequence[str]) -> dict[str, int]:
    """Bytes of every weight of the text model but those of the routed experts, whose modules
    ``layers`` names.

    The bytes are those of a checkpoint in ``dtype``, whatever dtype the model runs in: a weight
    that transformers keeps in float32 counts as float32, and a tied head is not counted.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    kept = [(re.compile(glob.replace("*", ".*")), always) for glob, always in plan.items()]
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    family = family_of(model.config.model_type)
    apart = tuple(f"{name}." for name in layers) + (family.others if family else ())
    sizes = {}
    for name, tensor in model.state_dict().items():
        if name in tied or name.startswith(apart):
            continue
        own = dtype if tensor.is_floating_point() else tensor.dtype
        of = next((always for pattern, always in kept if pattern.search(name)), own)
        sizes[name] = bytes_of(of, tuple(tensor.shape))
    return sizes
