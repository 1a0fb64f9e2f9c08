"""Which tensors of a checkpoint make which tensor of the model, and making it.

Names and layouts are translated by transformers' own conversion mapping, so every family it can
load is read as it loads it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerun.errors import RunError


@dataclass
class Target:
    """What makes up one tensor of the model: its converter, and by pattern the source names."""

    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        """All source names, in the order of their patterns."""
        return [name for names in self.sources.values() for name in names]


class TensorMap:
    """The targets of a checkpoint: by the name transformers gives it, what each is made of.

    Names that the model has not are among them, with the tensors that nothing takes.
    """

    def __init__(self, path: Path, model: nn.Module, config: Any, names: Iterable[str]) -> None:
        self.path = path
        self.model: Any = model
        self.config = config
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self.targets = self._match(names)

    def _match(self, names: Iterable[str]) -> dict[str, Target]:
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
        targets: dict[str, Target] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = name, None
            target = targets.setdefault(renamed, Target())
            target.sources[pattern or name].append(name)
            if pattern is not None:
                target.converter = by_pattern[pattern]
        return targets

    def make(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the model from those that `read` gives, in the checkpoint's dtype."""
        parts: dict[str, Any] = {
            pattern: [read(source) for source in names]
            for pattern, names in self.targets[name].sources.items()
        }
        tensor = self.convert(name, parts)
        if tensor.shape != self.state[name].shape:
            raise self.wrong_shape(name, tensor.shape, self.state[name].shape)
        return tensor

    def convert(self, name: str, made: dict[str, Any]) -> torch.Tensor:
        """Apply the converter to `made`, by source pattern; empties it, to hold nothing twice."""
        converter = self.targets[name].converter
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

    def wrong_shape(self, name: str, found: Iterable[int], wanted: Iterable[int]) -> RunError:
        """The error of a tensor whose shape is not that of the configuration."""
        return RunError(
            f"{self.path} has {name} as {tuple(found)} where the configuration says "
            f"{tuple(wanted)}: config.json and weights do not belong together"
        )
