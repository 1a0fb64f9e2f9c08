"""Stores read from the first byte to the last."""

from __future__ import annotations

import torch
from moerun.store.expert_store import ExpertStore


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
