"""Makes the model's tensors from those of a checkpoint, and knows which are made from which.

transformers' own conversion mapping translates names and layouts. So this module reads every family
that transformers can load, in the same way.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from moeroute.families import family_of
from torch import nn

from moerun.checkpoint.weights import Weights
from moerun.errors import RunError


@dataclass
class Target:
    """The sources of one tensor of the model: the converter, and the source names by pattern."""

    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        """All source names, in the order of their patterns."""
        return [name for names in self.sources.values() for name in names]


class TensorMap:
    """The targets of a checkpoint, by the name that transformers gives to each.

    Targets that the model does not have are included: their tensors are used by nothing.
    """

    def __init__(self, weights: Weights, model: nn.Module, config: Any) -> None:
        self.path = weights.path
        self.model: Any = model
        self.config = config
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self.targets = self._match(weights)

    def _match(self, weights: Weights) -> dict[str, Target]:
        from transformers.core_model_loading import (
            WeightConverter,
            dot_natural_key,
            rename_source_key,
        )

        mapping = [*self._to_text_alone(), *weights.transforms(self.model)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        targets: dict[str, Target] = {}
        for name in sorted(weights.names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = name, None
            target = targets.setdefault(renamed, Target())
            target.sources[pattern or name].append(name)
            if pattern is not None:
                target.converter = by_pattern[pattern]
        return targets

    def _to_text_alone(self) -> list[Any]:
        """The renaming of a text model's tensors that a checkpoint of text and images has."""
        from transformers.core_model_loading import WeightRenaming

        family = family_of(self.config.model_type)
        if family is None or family.text is None or self.config.model_type not in family.also:
            return []
        source = "^" + re.escape(family.text.prefix)
        return [WeightRenaming(source_patterns=source, target_patterns=family.text.becomes)]

    def make(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the model, made from the tensors that `read` gives, in the checkpoint's
        dtype."""
        parts: dict[str, Any] = {
            pattern: [read(source) for source in names]
            for pattern, names in self.targets[name].sources.items()
        }
        tensor = self.convert(name, parts)
        if tensor.shape != self.state[name].shape:
            raise self.wrong_shape(name, tensor.shape, self.state[name].shape)
        return tensor

    def convert(self, name: str, made: dict[str, Any]) -> torch.Tensor:
        """Apply the converter to `made`, tensors by source pattern. `made` is emptied, so that no
        tensor is held twice."""
        converter = self.targets[name].converter
        for operation in converter.operations if converter else ():
            try:
                made = copy.copy(operation).convert(
                    made,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=name,
                    model=self.model,
                    config=self.config,
                    missing_keys=None,
                )
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise RunError(
                    f"{name} cannot be made of the checkpoint's tensors ({reason}): their shapes "
                    "are not those of its configuration"
                ) from error
        (tensor,) = made.values()
        only: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return only

    def wrong_shape(self, name: str, found: Iterable[int], wanted: Iterable[int]) -> RunError:
        """The error for a tensor whose shape is not that of the configuration."""
        return RunError(
            f"{self.path} has {name} as {tuple(found)} where the configuration says "
            f"{tuple(wanted)}: config.json and weights do not belong together"
        )
