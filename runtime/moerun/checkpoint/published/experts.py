"""Experts in the bits of their publication, joined and turned as the model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moerun.checkpoint.expert_accounts import is_fused
from moerun.checkpoint.mapping import TensorMap
from moerun.checkpoint.published.reader import Coded
from moerun.checkpoint.weights import Weights
from moerun.format.block_files import from_file
from moerun.format.block_scheme import BlockScheme
from moerun.format.blocks import dequantise_blocks
from moerun.format.coding import Coding, Kept, decode, pack_elements
from moerun.format.expert import ExpertParam
from moerun.format.precision import Tensors

ReadPlain = Callable[[int, int, ExpertParam], torch.Tensor]
Params = tuple[ExpertParam, ...]


class CodedExperts:
    """Reads codes and scales of experts through transformers' conversion of names and layouts."""

    def __init__(
        self, checkpoint: Weights, mapping: TensorMap, layers: Sequence[str], n: int
    ) -> None:
        self._checkpoint, self._mapping = checkpoint, mapping
        self._layers, self._n_experts = layers, n
        self._proven: dict[tuple[str, Kept], Kept | None] = {}

    def kinds(self, params: Params, dtype: torch.dtype, read: ReadPlain) -> list[Params]:
        """The parameters of each layer, matrices with how records can keep them, to be computed in
        ``dtype``. Empty where they cannot be kept: not quantised, in a format without a kernel, or
        not in ways that one store holds. ``read`` gives the matrix of a layer's expert dequantised,
        to compare the first one in each way with.

        Layers, and matrices, may differ in the blocks that they are in, and in nothing else.
        """
        found = []
        for layer in range(len(self._layers)):
            kept = [
                replace(param, coding=self._coding(layer, param, read), dtype=dtype)
                if param.is_matrix
                else param
                for param in params
            ]
            if any(param.is_matrix and param.coding is None for param in kept):
                return []
            found.append(tuple(kept))
        codings = [param.coding for kept in found for param in kept if param.is_matrix]
        in_blocks = {isinstance(coding, BlockScheme) for coding in codings}
        if len(in_blocks) != 1 or (in_blocks == {False} and len(set(found)) > 1):
            return []
        return found

    def _coding(self, layer: int, param: ExpertParam, read: ReadPlain) -> Kept | None:
        """How records can keep a matrix of all experts of a layer; None where they cannot."""
        declared = {self._checkpoint.coding(name) for name in self._sources(layer, param)}
        coding = declared.pop() if len(declared) == 1 else None
        if coding is None or not coding.fits(param.shape, transposed=param.transposed):
            return None
        key = param.name, coding
        if key not in self._proven:
            self._proven[key] = self._prove(layer, param, coding, read(layer, 0, param))
        return self._proven[key]

    def _sources(self, layer: int, param: ExpertParam) -> Iterator[str]:
        target = self._mapping.targets[f"{self._layers[layer]}.{param.name}"]
        for names in target.sources.values():
            yield from names

    def _prove(
        self, layer: int, param: ExpertParam, coding: Kept, plain: torch.Tensor
    ) -> Kept | None:
        """``coding``, if the first expert's matrix that is kept so stands for ``plain``."""
        made = self.read(layer, 0, param)
        if isinstance(coding, BlockScheme):
            return coding if _stands_for(made, coding, plain) else None
        shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        # Where the model has the matrix turned, blocks are turned with it.
        for each in (coding, replace(coding, block=coding.block[::-1])):
            if shapes == {name: shape for name, _, shape in each.parts(*param.shape)} and (
                torch.equal(decode(made, each, torch.empty_like(plain)), plain)
            ):
                return each
        return None

    def attention(self, modules: Mapping[str, tuple[int, ...]]) -> dict[str, BlockScheme]:
        """The blocks of those projections (rows and columns by module) that records can keep as
        they are. Of the projections of one name, the first one in each type is compared with its
        values."""
        found: dict[str, BlockScheme] = {}
        proven: dict[tuple[str, BlockScheme], bool] = {}
        for module, shape in modules.items():
            name = f"{module}.weight"
            sources = self._mapping.targets[name].names
            declared = {self._checkpoint.coding(source) for source in sources}
            scheme = declared.pop() if len(declared) == 1 else None
            if not isinstance(scheme, BlockScheme) or not scheme.fits(shape):
                continue
            key = module.rpartition(".")[2], scheme
            if key not in proven:
                plain = self._mapping.make(name, self._checkpoint.read)
                proven[key] = _stands_for(self.read_matrix(name), scheme, plain)
            if proven[key]:
                found[module] = scheme
        return found

    def read_matrix(self, name: str) -> Tensors:
        """The codes and scales of a tensor of the model that is no expert's."""
        sources = self._mapping.targets[name].sources
        coded = {
            pattern: self._checkpoint.read_coded(names[0]) for pattern, names in sources.items()
        }
        return as_recorded(self._mapping, name, coded, of_experts=False)

    def read(self, layer: int, expert: int, param: ExpertParam) -> Tensors:
        """The codes and scales of one matrix of an expert, as a record keeps them."""
        name = f"{self._layers[layer]}.{param.name}"
        target = self._mapping.targets[name]
        sources: dict[str, Coded] = {
            pattern: (
                self._checkpoint.read_coded(names[0], expert)
                if is_fused(target, names, self._n_experts)
                else self._checkpoint.read_coded(names[expert])
            )
            for pattern, names in target.sources.items()
        }
        return as_recorded(self._mapping, name, sources)


def _stands_for(made: Tensors, scheme: BlockScheme, plain: torch.Tensor) -> bool:
    """Whether the parts of a record are those of the matrix ``plain``."""
    rows, columns = plain.shape
    laid = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()]
    return laid == scheme.parts(rows, columns) and torch.equal(
        dequantise_blocks(made, scheme, rows), plain
    )


def as_recorded(
    mapping: TensorMap, name: str, sources: dict[str, Coded], *, of_experts: bool = True
) -> Tensors:
    """The record's parts of the model's tensor ``name``, or of one expert of it, made from those in
    a checkpoint, by the patterns of their names."""
    coding = next(iter(sources.values())).coding
    parts: dict[str, torch.Tensor] = {}
    for part in next(iter(sources.values())).parts:
        each: dict[str, Any] = {
            p: coded.parts[part][None] if of_experts else [coded.parts[part]]
            for p, coded in sources.items()
        }
        made = mapping.convert(name, each)
        parts[part] = made.squeeze(0) if of_experts else made
    if isinstance(coding, BlockScheme):
        return from_file(parts["rows"], coding)
    assert isinstance(coding, Coding)
    return {
        "codes": pack_elements(parts["codes"], coding),
        "scales": parts["scales"].contiguous(),
    }
