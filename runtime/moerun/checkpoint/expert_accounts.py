"""Checks the tensors that experts are made of: their number and their shapes."""

from __future__ import annotations

import re
from typing import Any

import torch

from moerun.checkpoint.mapping import Target, TensorMap
from moerun.checkpoint.weights import Weights
from moerun.errors import RunError


class ShapesAlone:
    """Makes a model's tensors from shapes alone, so that a misfit is found without reading."""

    def __init__(self, checkpoint: Weights, mapping: TensorMap) -> None:
        self._checkpoint = checkpoint
        self._mapping = mapping

    def check(self, name: str, sources: list[str]) -> None:
        """Raises RunError where the model's tensor cannot be made of ``sources``."""
        try:
            self._mapping.make(name, self.empty)
        except RunError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise self.not_together(sources) from error

    def empty(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint without its values."""
        entry = self._checkpoint.entry(name)
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def not_together(self, sources: list[str]) -> RunError:
        """The error of tensors that do not fit together."""
        shapes = ", ".join(f"{n!r} {list(self._checkpoint.entry(n).shape)}" for n in sources[:3])
        return RunError(
            f"{self._checkpoint.path} has tensors that do not fit together ({shapes}): "
            "download it again"
        )


class ExpertAccounts:
    """The tensors of a layer's experts: fused, or one of each expert."""

    def __init__(self, checkpoint: Weights, mapping: TensorMap, n_experts: int) -> None:
        self._checkpoint = checkpoint
        self._path = checkpoint.path
        self._mapping = mapping
        self._shapes = ShapesAlone(checkpoint, mapping)
        self._n_experts = n_experts

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises RunError where the sources of the fused tensor ``name`` are too many, too few, or
        make experts of another ``shape``."""
        target, n_experts = self._mapping.targets[name], self._n_experts
        for pattern, names in target.sources.items():
            if is_fused(target, names, n_experts):
                self._check_fused(name, names[0])
            else:
                self._check_numbers(name, pattern, names)
        if all(is_fused(target, names, n_experts) for names in target.sources.values()):
            self._shapes.check(name, target.names)
        else:
            self._check_made(name, target, shape)

    def _check_made(self, name: str, target: Target, shape: tuple[int, ...]) -> None:
        """Check that the first expert's tensors make one of the model's shape."""
        parts: dict[str, Any] = {
            p: self._shapes.empty(names[0])[None] for p, names in target.sources.items()
        }
        try:
            made = tuple(self._mapping.convert(name, parts).squeeze(0).shape)
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._shapes.not_together(
                [names[0] for names in target.sources.values()]
            ) from error
        if made != shape:
            raise RunError(
                f"{self._checkpoint.described(target.names[0])} makes {name} {made} an expert "
                f"where the configuration says {shape}: config.json and weights do not belong "
                "together"
            )

    def _check_fused(self, name: str, source: str) -> None:
        shape, n_experts = self._checkpoint.entry(source).shape, self._n_experts
        if not shape or shape[0] != n_experts:
            raise RunError(
                f"{self._checkpoint.described(source)} has {shape[0] if shape else 'no'} experts "
                f"for {name} where config.json says {n_experts}: config.json and weights do not "
                "belong together"
            )

    def _check_numbers(self, name: str, pattern: str, names: list[str]) -> None:
        """Check that there is one tensor for each expert, numbered from 0, all of one shape."""
        numbered, n_experts = _numbered(names, pattern), self._n_experts
        missing = [expert for expert in range(n_experts) if expert not in numbered]
        if missing:
            raise RunError(
                f"{self._path} has {len(names)} of {n_experts} tensors {pattern!r} for {name}, "
                f"none of expert {missing[0]}: download it again"
            )
        if len(names) != n_experts:
            raise RunError(
                f"{self._path} has {len(names)} tensors {pattern!r} for {name} where config.json "
                f"says {n_experts} experts: config.json and weights do not belong together"
            )
        first = self._checkpoint.entry(names[0]).shape
        for other in names:
            if self._checkpoint.entry(other).shape != first:
                raise RunError(
                    f"{self._checkpoint.described(other)} has another shape than expert 0's, "
                    f"{list(first)}: one of them is of another checkpoint; download it again"
                )


def is_fused(target: Target, names: list[str], n_experts: int) -> bool:
    """Whether one tensor has all experts, by its first dimension."""
    return len(names) == 1 and (n_experts > 1 or target.converter is None)


def _numbered(names: list[str], pattern: str) -> set[int]:
    """The numbers of the experts, which stand where the pattern has its star. Such a pattern is a
    regular expression but for the star."""
    found = (re.search(pattern.replace("*", r"(\d+)"), name) for name in names)
    return {int(match[1]) for match in found if match is not None}
