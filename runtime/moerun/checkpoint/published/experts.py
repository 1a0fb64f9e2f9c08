"""Experts in the bits of their publication, joined and turned as the model has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moerun.checkpoint.expert_accounts import is_fused
from moerun.checkpoint.mapping import TensorMap
from moerun.checkpoint.published.reader import Coded
from moerun.checkpoint.weights import Weights
from moerun.format.coding import Coding, decode, pack_elements
from moerun.format.expert import ExpertParam
from moerun.format.precision import Tensors


class CodedExperts:
    """Reads codes and scales of experts through transformers' conversion of names and layouts."""

    def __init__(
        self, checkpoint: Weights, mapping: TensorMap, layers: Sequence[str], n: int
    ) -> None:
        self._checkpoint, self._mapping = checkpoint, mapping
        self._layers, self._n_experts = layers, n

    def coding(
        self, param: ExpertParam, read: Callable[[int, int, ExpertParam], torch.Tensor]
    ) -> Coding | None:
        """How records can keep a matrix of all experts of all layers; None where they cannot: not
        quantised, not all alike, or in a format without a kernel. ``read`` gives the matrix of a
        layer's expert dequantised, to compare the first one with."""
        found = {
            self._checkpoint.coding(name)
            for layer in self._layers
            for names in self._mapping.targets[f"{layer}.{param.name}"].sources.values()
            for name in names
        }
        coding = found.pop() if len(found) == 1 else None
        if coding is None or not coding.fits(param.shape):
            return None
        parts, plain = self.read(0, 0, param), read(0, 0, param)
        laid = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        # Where the model has the matrix turned, blocks are turned with it.
        for each in (coding, replace(coding, block=coding.block[::-1])):
            if laid == {name: shape for name, _, shape in each.parts(param.shape)} and torch.equal(
                decode(parts, each, torch.empty_like(plain)), plain
            ):
                return each
        return None

    def read(self, layer: int, expert: int, param: ExpertParam) -> Tensors:
        """The codes and scales of one matrix of an expert, as a record keeps them."""
        name = f"{self._layers[layer]}.{param.name}"
        target = self._mapping.targets[name]
        parts: dict[str, Coded] = {
            pattern: (
                self._checkpoint.read_coded(names[0], expert)
                if is_fused(target, names, self._n_experts)
                else self._checkpoint.read_coded(names[expert])
            )
            for pattern, names in target.sources.items()
        }
        coding = next(iter(parts.values())).coding
        elements: dict[str, Any] = {p: each.elements[None] for p, each in parts.items()}
        scales: dict[str, Any] = {p: each.scales[None] for p, each in parts.items()}
        return {
            "codes": pack_elements(self._mapping.convert(name, elements).squeeze(0), coding),
            "scales": self._mapping.convert(name, scales).squeeze(0).contiguous(),
        }
