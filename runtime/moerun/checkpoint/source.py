"""Reading a checkpoint one expert, or one dense tensor, at a time, in bounded memory.

Names and layouts are translated by transformers' own conversion mapping, applied to the slices
that belong to one expert, so every family it can load is read as it loads it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.families import (
    count_experts,
    empty_model,
    expert_shape,
    find_attention,
    find_experts,
    read_config,
)
from moerun.errors import RunError
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.tensorfile import CACHE_LINE, TensorEntry, TensorFile, bytes_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Checkpoint:
    """The tensors of a folder of safetensors files, by name. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        """Raises RunError when a file is missing or damaged, or there is nothing but pickles."""
        self.path = path
        self._files: dict[str, TensorFile] = {}
        self._of: dict[str, TensorFile] = {}
        try:
            for name in self._file_names():
                file = self._files[name] = TensorFile(path / name)
                self._of.update(dict.fromkeys(file.entries, file))
        except BaseException:
            self.close()
            raise

    def _file_names(self) -> list[str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise RunError(f"{index} is damaged: download it again") from error
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(f.name for f in self.path.iterdir() if f.suffix in _PICKLED)
        if pickles:
            raise RunError(
                f"{self.path} has its weights only as pickles ({pickles[0]}), which can run code "
                "when read: give a checkpoint in safetensors format"
            )
        raise RunError(f"{self.path} has no weights: there is neither {SINGLE} nor {INDEX}")

    @property
    def names(self) -> list[str]:
        return list(self._of)

    @property
    def total_bytes(self) -> int:
        return sum(file.file_bytes for file in self._files.values())

    def entry(self, name: str) -> TensorEntry:
        return self._of[name].entries[name]

    def read(self, name: str) -> torch.Tensor:
        return self._of[name].read(name)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self._of[name].read_row(name, row)

    def digest(self) -> str:
        """SHA-256 over names, shapes and samples of the weights: which checkpoint it is.

        The samples tell models of one architecture apart; every byte would take minutes.
        """
        digest = hashlib.sha256()
        for name, file in self._files.items():
            shapes = sorted((e.name, str(e.dtype), e.shape) for e in file.entries.values())
            digest.update(json.dumps([name, file.file_bytes, shapes]).encode())
            last = max(file.file_bytes - _SAMPLE_BYTES, 0)
            for sample in range(_SAMPLES):
                offset = file.header_bytes + (last - file.header_bytes) * sample // (_SAMPLES - 1)
                digest.update(os.pread(file.fd, _SAMPLE_BYTES, max(offset, 0)))
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass
class _Target:
    """What makes up one tensor of the model: its converter, and by pattern the source names."""

    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


class ModelSource:
    """A checkpoint as its model wants it: dense tensors by name, experts by layer and number."""

    def __init__(
        self, path: Path, *, dtype: torch.dtype | None = None, attention_apart: bool = False
    ) -> None:
        """`dtype` of the dense tensors, cast as transformers would; None: the checkpoint's own.

        `attention_apart`: the projections in `attention` are not among the dense tensors.
        Raises RunError for what is no supported checkpoint, or lacks tensors.
        """
        self.config = read_config(path)
        self.checkpoint = Checkpoint(path)
        try:
            self._describe(dtype, attention_apart)
        except BaseException:
            self.checkpoint.close()
            raise

    def _describe(self, dtype: torch.dtype | None, attention_apart: bool) -> None:
        native = self._native_dtype()
        self.dtype = dtype or native
        self.model = empty_model(self.config, self.dtype)
        found = find_experts(self.model)
        self.layers = tuple(name for name, _ in found)
        self.shape: ExpertShape = expert_shape(found[0][1], native)
        self.n_experts = count_experts(found[0][1])
        self.attention = {
            name: tuple(linear.weight.shape) for name, linear in find_attention(self.model)
        }
        """Rows and columns of each projection of attention, by its module's name."""
        self._apart = {f"{name}.weight" for name in self.attention} if attention_apart else set()
        self._state = self.model.state_dict()
        self._dtypes = _dtypes_of(self.model, self._state, self.dtype)
        self._targets = self._match()
        self._check_whole()
        params = tuple(replace(p, skew=self._expert_skew(p)) for p in self.shape.params)
        self.shape = ExpertShape(params)

    def _native_dtype(self) -> torch.dtype:
        stated = getattr(self.config, "dtype", None)
        if isinstance(stated, torch.dtype):
            return stated
        entries = map(self.checkpoint.entry, self.checkpoint.names)
        return next((e.dtype for e in entries if e.dtype.is_floating_point), torch.float32)

    def _match(self) -> dict[str, _Target]:
        """For every tensor of the model, the tensors of the checkpoint that make it."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        targets: dict[str, _Target] = defaultdict(_Target)
        for name in sorted(self.checkpoint.names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if renamed not in self._state and name in self._state:
                renamed, pattern = name, None
            target = targets[renamed]
            target.sources[pattern or name].append(name)
            if pattern is not None:
                target.converter = by_pattern[pattern]
        return targets

    def _check_whole(self) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        for name in self._state:
            if name not in self._targets and name not in tied:
                raise RunError(
                    f"{self.checkpoint.path} has no weights for {name}: download it again"
                )
        for layer in self.layers:
            for param in self.shape.params:
                self._check_experts(f"{layer}.{param.name}")

    def _check_experts(self, target: str) -> None:
        for pattern, names in self._targets[target].sources.items():
            fused = len(names) == 1 and self.checkpoint.entry(names[0]).shape[0] == self.n_experts
            if not fused and len(names) != self.n_experts:
                raise RunError(
                    f"{self.checkpoint.path} has {len(names)} of {self.n_experts} tensors "
                    f"{pattern!r} for {target}: download it again"
                )

    def dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of all but experts (and attention, if apart), in model order."""
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
            yield name, self._make(name, self.checkpoint.read).to(self._dtypes[name])

    def dense_skew(self) -> dict[str, int]:
        """The dense tensors that a stock load leaves at odd addresses: bytes past a multiple of 64.

        It maps the file where nothing is converted, and the last bit of a float32 product can
        depend on how its operands are aligned.
        """
        skews = {n: self._skew(n, dtype) for n, (dtype, _) in self.dense_tensors().items()}
        return {name: skew for name, skew in skews.items() if skew}

    def _expert_skew(self, param: ExpertParam) -> int:
        """The skew that all experts of all layers share; 0 where they do not."""
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
        """The parameters of one expert as they are stored, without the dimension of the experts."""
        return {param.name: self._expert_param(layer, expert, param) for param in self.shape.params}

    def read_attention(self, module: str) -> dict[str, torch.Tensor]:
        """The weight of one projection of attention, as it is stored."""
        return {"weight": self._make(f"{module}.weight", self.checkpoint.read)}

    def _expert_param(self, layer: int, expert: int, param: ExpertParam) -> torch.Tensor:
        name = f"{self.layers[layer]}.{param.name}"
        target = self._targets[name]
        # Tensors, not lists of one: merging those would copy them.
        parts: dict[str, Any] = {
            pattern: (
                self.checkpoint.read(names[expert])
                if len(names) == self.n_experts
                else self.checkpoint.read_row(names[0], expert)
            )[None]
            for pattern, names in target.sources.items()
        }
        tensor = self._convert(name, target, parts).squeeze(0)
        if tuple(tensor.shape) != param.shape:
            raise RunError(
                f"{self.checkpoint.path} has {name} as {tuple(tensor.shape)} an expert where the "
                f"configuration says {param.shape}: config.json and weights do not belong together"
            )
        return tensor

    def _make(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        target = self._targets[name]
        parts: dict[str, Any] = {
            pattern: [read(source) for source in names] for pattern, names in target.sources.items()
        }
        tensor = self._convert(name, target, parts)
        if tensor.shape != self._state[name].shape:
            raise RunError(
                f"{self.checkpoint.path} has {name} as {tuple(tensor.shape)} where the "
                f"configuration says {tuple(self._state[name].shape)}: config.json and weights do "
                "not belong together"
            )
        return tensor

    def _convert(self, name: str, target: _Target, made: dict[str, Any]) -> torch.Tensor:
        """Apply the converter to `made`, by source pattern; empties it, to hold nothing twice."""
        converter = target.converter
        for operation in converter.operations if converter else ():
            made = copy.copy(operation).convert(
                made,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self.model,
                config=self.config,
                missing_keys=None,
            )
        (tensor,) = made.values()
        only: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return only

    def close(self) -> None:
        self.checkpoint.close()


def _dtypes_of(
    model: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype transformers would load each tensor in: some stay float32 whatever is asked."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    patterns = [(re.compile(glob.replace("*", ".*")), kept) for glob, kept in plan.items()]
    return {
        name: next((kept for pattern, kept in patterns if pattern.search(name)), tensor.dtype)
        for name, tensor in state.items()
    }
