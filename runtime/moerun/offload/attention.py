"""Attention computed from packed records: a module that stands in the place of an nn.Linear.

transformers' own attention calls it as it calls the projections it was made with.
"""

from __future__ import annotations

import torch
from torch import nn

from moerun.checkpoint.families import find_attention
from moerun.errors import RunError
from moerun.format.precision import NATIVE
from moerun.kernels.blocks import BlockLinear
from moerun.kernels.slots import SlotForm
from moerun.store.expert_store import ExpertStore
from moerun.store.index import LinearRecord


class PackedLinear(nn.Module):
    """A linear projection in the form that quantised experts compute in; its bias stays plain."""

    def __init__(
        self, linear: nn.Linear, record: LinearRecord, precision: str, device: torch.device
    ) -> None:
        """``record`` is of a matrix that ``linear`` would have."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        form = SlotForm(record.shape, precision, device)
        self._slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8, device=device))
        self._record_bytes = form.record_bytes
        self._on_host = device.type == "cpu"

    @property
    def blocks(self) -> BlockLinear | None:
        """The matrix, without the bias, where it is in blocks of llama.cpp."""
        (linear,) = self._slot.linears
        return linear if isinstance(linear, BlockLinear) else None

    def read(self, store: ExpertStore, module: str) -> None:
        """Take up the record of `module`. Raises RunError when it is damaged."""
        record = self._slot.landing if self._on_host else None
        if record is None:
            record = torch.empty(self._record_bytes, dtype=torch.uint8)
        store.read_attention(module, record)
        self._slot.arrive(record)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x[..., K] to [..., N], in the dtype of x."""
        (linear,) = self._slot.linears
        y = linear(x.reshape(-1, self.in_features)).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def packed_attention_bytes(store: ExpertStore, device: torch.device) -> int:
    """The memory that a store's packed attention takes on a device; 0 where it is not packed."""
    packed = store.index.attention
    if packed is None:
        return 0
    return sum(
        SlotForm(linear.shape, packed.precision, device).slot_bytes for linear in packed.linears
    )


def install_attention(model: nn.Module, store: ExpertStore, device: torch.device) -> None:
    """Put packed projections in the place of the model's; nothing where attention is not packed.

    Raises RunError when the store's attention is not that of its config.json, or is damaged.
    """
    packed = store.index.attention
    if packed is None:
        return
    stored = {record.module: record for record in packed.linears}
    some = packed.precision == NATIVE  # the others are among the dense weights
    found = {n: linear for n, linear in find_attention(model) if n in stored or not some}
    wanted = {name: (record.rows, record.columns) for name, record in stored.items()}
    if wanted != {name: tuple(linear.weight.shape) for name, linear in found.items()}:
        raise RunError(
            f"{store.path}: the attention in index.json is not that of config.json: "
            "pack the store again"
        )
    for name, linear in found.items():
        standing = PackedLinear(linear, stored[name], packed.precision, device)
        standing.read(store, name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, standing)
