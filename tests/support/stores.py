"""Stores and checkpoints as files: read, compared, and written again with a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from moerun.checkpoint.hub import resolve
from moerun.store.expert_store import ExpertStore
from safetensors.torch import load_file, save_file

TINY = resolve("tiny")


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's files, by name."""
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the weights again after ``change`` to their dict."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def verify(store: ExpertStore) -> None:
    """Read all that lies in the store's folder; RunError where a checksum differs."""
    with ExpertStore.open(store.path) as fresh:  # which has compared none yet
        for _ in fresh.read_dense():
            pass
        buffer = torch.empty(fresh.record_bytes, dtype=torch.uint8)
        for key in range(fresh.n_keys):
            fresh.read_into(key, buffer)
        if attention := fresh.index.attention:
            for linear in attention.linears:
                length = attention.layout(linear).record_bytes
                fresh.read_attention(linear.module, torch.empty(length, dtype=torch.uint8))
