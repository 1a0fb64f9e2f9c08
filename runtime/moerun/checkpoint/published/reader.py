"""What a format of quantised weights must say of itself to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from moerun.format.coding import Coding, Kept
from moerun.format.precision import Tensors


class Header(NamedTuple):
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Header:
        """The header that a tensor would be stored with."""
        return cls(tensor.dtype, tuple(tensor.shape))


Headers = Mapping[str, Header]
"""The headers of one weight's tensors, by their roles."""


class MisfitError(ValueError):
    """Tensors of one weight that do not belong together; the message says why."""


@dataclass(frozen=True, slots=True)
class Names:
    """How the tensors of one weight are named: what each name ends in, after a common beginning.

    weight    the ending of the unquantised weight's name
    parts     endings by role, of the tensors that must be there
    optional  endings by role, of those that may be
    tells     the role whose ending shows that a weight is quantised so
    dtypes    that the role `codes` may have; empty: any
    """

    weight: str
    parts: Mapping[str, str]
    tells: str
    optional: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()


class Coded(NamedTuple):
    """A matrix in the bits of its publication, in parts that are joined and turned as it is: of a
    `Coding` ``codes``, one a weight, uint8[rows, columns], and the ``scales`` of blocks; of blocks
    of llama.cpp ``rows``, uint8[rows, bytes of a row]."""

    coding: Kept
    parts: Tensors


class Reader(Protocol):
    """Makes weights of one format from their stored tensors, one weight at a time."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """`described` is what the checkpoint declares of its quantisation; may be empty."""

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """The shape of the weight. Raises MisfitError where its tensors do not fit together."""

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """The weight from its tensors by role, rounded to `dtype` once."""

    def coding(self, headers: Headers) -> Coding | None:
        """How a record can keep the weight in its own bits; None where it cannot."""

    def coded(self, parts: Tensors) -> Coded:
        """The weight in its own bits, as `coding` has it."""


class Dequantising:
    """What readers share whose weights are kept dequantised only."""

    def coding(self, headers: Headers) -> Coding | None:
        """None: there is no kernel for their bits."""
        return None

    def coded(self, parts: Tensors) -> Coded:
        """Not to be called: there is no coding."""
        raise AssertionError("a format that is not kept")
