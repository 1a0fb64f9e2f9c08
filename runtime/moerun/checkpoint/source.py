"""Reads a checkpoint one expert, or one dense tensor, at a time, in bounded memory.

transformers' own conversion mapping translates names and layouts, applied to the slices of one
expert. So this module reads every family that transformers can load, in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moeroute.families import family_of
from torch import nn

from moerun.checkpoint.accounting import PLAIN_FLOATS, Accounts, notes_of_left_out
from moerun.checkpoint.expert_accounts import is_fused
from moerun.checkpoint.families import (
    attention_left_out,
    config_place,
    count_experts,
    empty_model,
    expert_shape,
    find_attention,
    find_experts,
    read_config,
)
from moerun.checkpoint.mapping import TensorMap
from moerun.checkpoint.opening import open_weights
from moerun.checkpoint.published.experts import CodedExperts
from moerun.errors import RunError
from moerun.format.block_scheme import BlockScheme
from moerun.format.expert import KIND, ExpertParam, ExpertShape
from moerun.format.precision import NATIVE
from moerun.format.tensorfile import CACHE_LINE, bytes_of


class ModelSource:
    """A checkpoint in the model's terms: dense tensors by name, experts by layer and number.

    The class is long because dense tensors, attention and experts, as values and in their own bits,
    are read from the same files, by the same names.
    """

    def __init__(
        self, path: Path, *, dtype: torch.dtype | None = None, attention_apart: bool = False
    ) -> None:
        """`path` is a folder, or a GGUF file.

        `dtype` of the dense tensors, cast as transformers would; None: the checkpoint's own.
        `attention_apart`: the projections in `attention` are not among the dense tensors. Raises
        RunError for what is not a supported checkpoint, and for a checkpoint that lacks tensors.
        """
        self.config = read_config(path)
        self.checkpoint = open_weights(path)
        try:
            self._describe(dtype, attention_apart)
        except BaseException:
            self.checkpoint.close()
            raise

    def _describe(self, dtype: torch.dtype | None, attention_apart: bool) -> None:
        native = self._native_dtype()
        self.dtype = dtype or native
        self._refuse_float16()
        self.checkpoint.dtype = self.dtype
        self.model = empty_model(self.config, self.dtype)
        found = find_experts(self.model)
        self.layers = tuple(name for name, _ in found)
        self.shape, self.n_experts = self._one_shape([module for _, module in found], native)
        self.attention = {
            name: tuple(linear.weight.shape) for name, linear in find_attention(self.model)
        }
        """Rows and columns of each projection of attention, by its module's name."""
        self._apart = {f"{name}.weight" for name in self.attention} if attention_apart else set()
        self.kept_attention: dict[str, BlockScheme] = {}
        """The blocks of the projections of attention that are kept as they are: see
        `keep_attention`."""
        self._mapping = TensorMap(self.checkpoint, self.model, self.config)
        self._state, self._targets = self._mapping.state, self._mapping.targets
        self._dtypes = _dtypes_of(self.model, self._state, self.dtype)
        left_out = Accounts(self.checkpoint, self._mapping).check(
            self.layers, self.shape.params, self.n_experts
        )
        params = tuple(replace(p, skew=self._expert_skew(p)) for p in self.shape.params)
        self._coded = CodedExperts(self.checkpoint, self._mapping, self.layers, self.n_experts)
        self._params = self._coded.kinds(params, self.dtype, self._expert_param)
        """Of each layer, where native records keep the bits of publication; else empty."""
        first, *others = dict.fromkeys(self._params or [params])
        self.shape = ExpertShape(first, tuple(others))
        self.notes = [
            *_notes(self.checkpoint.path, left_out, self.config),
            *self.checkpoint.notes(self.shape.kept_as(NATIVE)),
            *self._tie(),
        ]
        """What a person should know of how the checkpoint is taken, one line each."""

    def _native_dtype(self) -> torch.dtype:
        stated = getattr(self.config, "dtype", None)
        if not isinstance(stated, torch.dtype):
            return self.checkpoint.first_float() or torch.float32
        if stated not in PLAIN_FLOATS:
            raise RunError(
                f"{config_place(self.checkpoint.path)} says dtype {stated}, in which no model "
                "computes: it must be float32, float16 or bfloat16"
            )
        return stated

    def _refuse_float16(self) -> None:
        family = family_of(self.config.model_type)
        if self.dtype is torch.float16 and family is not None and family.no_float16:
            raise RunError(
                f"{self.checkpoint.path}: stock transformers cannot compute a {family.model_type} "
                "model in float16: give --precision bf16 or fp32"
            )

    def _one_shape(self, modules: list[nn.Module], native: torch.dtype) -> tuple[ExpertShape, int]:
        """The shape of an expert and the number of experts a layer, which all layers share."""
        kinds = {(expert_shape(module, native), count_experts(module)) for module in modules}
        if not kinds or any(n < 1 for _, n in kinds):
            raise RunError(
                f"{config_place(self.checkpoint.path)} describes a {self.config.model_type} "
                "model without any experts, which needs no offloading of them"
            )
        if len(kinds) > 1:
            raise RunError(
                f"{config_place(self.checkpoint.path)} describes layers whose experts differ in "
                "shape or number, which is not supported"
            )
        return kinds.pop()

    def _tie(self) -> list[str]:
        """Tie the tensors that stock transformers ties; returns notes of what differs from the
        configuration.

        A head that differs from the embeddings is kept, a head that equals them is left out, and
        where only one of the two is there it stands for both.
        """
        notes = []
        ties: dict[str, str] = self._mapping.model.all_tied_weights_keys
        for target, source in ties.items():
            own, origin = self._targets.get(target), self._targets.get(source)
            if own is None:
                continue
            if origin is None:
                self._targets[source] = self._targets.pop(target)
            elif self.checkpoint.equal(own.names[0], origin.names[0], self._dtypes[target]):
                del self._targets[target]
            else:
                notes.append(
                    f"config.json says that {target} is {source}, the checkpoint holds another "
                    f"{target}: it is kept, as stock transformers does"
                )
        return notes

    def dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of all tensors but the experts' (and attention's, if apart), in
        model order."""
        return {
            name: (self._dtypes[name], tuple(tensor.shape))
            for name, tensor in self._state.items()
            if name in self._targets
            and name not in self._apart
            and not name.startswith(tuple(f"{n}." for n in self.layers))
        }

    def read_dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each dense tensor in its dtype, one at a time."""
        for name in self.dense_tensors():
            yield name, self._mapping.make(name, self.checkpoint.read).to(self._dtypes[name])

    def dense_skew(self) -> dict[str, int]:
        """The dense tensors that a stock load leaves at odd addresses: bytes past a multiple of 64.

        A stock load maps the file where nothing is converted, and the last bit of a float32 product
        can depend on the alignment of its operands.
        """
        skews = {n: self._skew(n, dtype) for n, (dtype, _) in self.dense_tensors().items()}
        return {name: skew for name, skew in skews.items() if skew}

    def _expert_skew(self, param: ExpertParam) -> int:
        """The skew that all experts of all layers share; 0 where they differ."""
        if bytes_of(param.dtype, param.shape) % CACHE_LINE:
            return 0
        skews = {self._skew(f"{layer}.{param.name}", param.dtype) for layer in self.layers}
        return skews.pop() if len(skews) == 1 else 0

    def _skew(self, name: str, dtype: torch.dtype) -> int:
        target = self._targets[name]
        entry = self.checkpoint.entry(target.names[0])
        mapped = target.converter is None and entry.dtype == dtype
        skew = entry.offset % CACHE_LINE
        return skew if mapped and skew % dtype.itemsize == 0 else 0

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The stored parameters of one expert, without the dimension of the experts."""
        return {param.name: self._expert_param(layer, expert, param) for param in self.shape.params}

    def kind(self, layer: int) -> int:
        """The number of the layer's kind, by what native records keep its experts in."""
        kinds = (self.shape.params, *self.shape.others)
        return kinds.index(self._params[layer]) if self._params else 0

    def read_coded_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The parts of one expert's native record, matrices in the bits of their publication."""
        parts: dict[str, torch.Tensor] = {}
        if self.shape.others:
            parts[KIND] = torch.tensor([self.kind(layer)], dtype=torch.uint8)
        for param in self._params[layer]:
            if param.coding is None:
                parts[param.name] = self._expert_param(layer, expert, param)
                continue
            coded = self._coded.read(layer, expert, param)
            parts |= {f"{param.name}.{part}": tensor for part, tensor in coded.items()}
        return parts

    def keep_attention(self) -> None:
        """Have the projections of attention that are in blocks of llama.cpp in ``kept_attention``,
        not among the dense tensors, where native records keep experts in such blocks."""
        if self.shape.blocks(NATIVE):
            self.kept_attention = self._coded.attention(self.attention)
            self._apart |= {f"{module}.weight" for module in self.kept_attention}

    def read_attention(self, module: str) -> dict[str, torch.Tensor]:
        """The stored weight of one projection of attention, or its blocks where they are kept."""
        if module in self.kept_attention:
            parts = self._coded.read_matrix(f"{module}.weight")
            return {f"weight.{part}": tensor for part, tensor in parts.items()}
        return {"weight": self._mapping.make(f"{module}.weight", self.checkpoint.read)}

    def _expert_param(self, layer: int, expert: int, param: ExpertParam) -> torch.Tensor:
        name = f"{self.layers[layer]}.{param.name}"
        target = self._targets[name]
        # Tensors, not lists of one: merging those would copy them.
        parts: dict[str, Any] = {
            pattern: (
                self.checkpoint.read_row(names[0], expert)
                if is_fused(target, names, self.n_experts)
                else self.checkpoint.read(names[expert])
            )[None]
            for pattern, names in target.sources.items()
        }
        return self._mapping.convert(name, parts).squeeze(0)

    def close(self) -> None:
        """Close the checkpoint. May be called again."""
        self.checkpoint.close()


def _notes(path: Path, left_out: list[str], config: Any) -> Iterator[str]:
    if (asked := attention_left_out(path)) is not None:
        yield (
            f"config.json asks for attention by {asked!r}: torch's own is used, which computes the "
            "same up to rounding"
        )
    yield from notes_of_left_out(left_out, config)


def _dtypes_of(
    model: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that transformers would load each tensor in: some always stay float32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    patterns = [(re.compile(glob.replace("*", ".*")), kept) for glob, kept in plan.items()]
    return {
        name: next((kept for pattern, kept in patterns if pattern.search(name)), tensor.dtype)
        for name, tensor in state.items()
    }
