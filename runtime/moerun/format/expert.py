"""What one expert of a model consists of, and the record it becomes at a precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moerun.format.coding import Coding
from moerun.format.layout import RecordLayout
from moerun.format.precision import NATIVE, PLAIN, PartSpec, scheme_of
from moerun.format.tensorfile import DTYPE_NAMES, DTYPES


@dataclass(frozen=True, slots=True)
class ExpertParam:
    """One parameter of the fused experts, without the dimension of the experts.

    `transposed`: a matrix [K, N] that multiplies from the right (x @ W), not [N, K].
    `skew`: bytes past a multiple of 64 at which stock transformers has every expert's (0 but for
    checkpoints with fused experts), which a product's last bit can depend on.
    `coding`: of a matrix that is published quantised, how native records keep it; computed in
    `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    skew: int = 0
    coding: Coding | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, which a precision may quantise, not a bias."""
        return len(self.shape) == 2

    @property
    def rows_columns(self) -> tuple[int, int]:
        """Output and input features."""
        first, second = self.shape
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The parameters of one expert, in the order of their record."""

    params: tuple[ExpertParam, ...]

    @classmethod
    def matrix(cls, rows: int, columns: int) -> ExpertShape:
        """A single matrix [rows, columns], such as a projection of attention."""
        return cls((ExpertParam("weight", (rows, columns), torch.bfloat16),))

    @property
    def n_weights(self) -> int:
        """Numbers in one expert's parameters, biases included."""
        return sum(math.prod(param.shape) for param in self.params)

    def coding(self, precision: str) -> Coding | None:
        """How records at `precision` keep the first matrix in the bits of its publication; None
        where they do not."""
        codings = [param.coding for param in self.params if param.is_matrix]
        return codings[0] if precision == NATIVE and codings else None

    def record(self, precision: str) -> RecordLayout:
        """The record of one expert at `precision`. Raises RunError when it does not exist."""
        scheme = scheme_of(precision)
        tensors: list[PartSpec] = []
        for param in self.params:
            if scheme and param.is_matrix:
                scheme.check(param.name, param.rows_columns[1])
                tensors += [
                    (f"{param.name}.{part}", dtype, shape)
                    for part, dtype, shape in scheme.parts(*param.rows_columns)
                ]
            elif precision == NATIVE and param.coding:
                tensors += [
                    (f"{param.name}.{part}", dtype, shape)
                    for part, dtype, shape in param.coding.parts(param.shape)
                ]
            else:
                dtype = PLAIN.get(precision, param.dtype)
                tensors.append((param.name, dtype, param.shape))
        skews = {p.name: p.skew for p in self.params if PLAIN.get(precision, p.dtype) == p.dtype}
        return RecordLayout.of(tensors, skews)

    def to_json(self) -> list[dict[str, Any]]:
        """The parameters as `from_json` reads them."""
        return [
            {
                "name": param.name,
                "shape": list(param.shape),
                "dtype": DTYPE_NAMES[param.dtype],
                "transposed": param.transposed,
                "skew": param.skew,
                **({"coding": param.coding.to_json()} if param.coding else {}),
            }
            for param in self.params
        ]

    @classmethod
    def from_json(cls, described: Sequence[Mapping[str, Any]]) -> ExpertShape:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        return cls(
            tuple(
                ExpertParam(
                    p["name"],
                    tuple(map(int, p["shape"])),
                    DTYPES[p["dtype"]],
                    bool(p["transposed"]),
                    int(p["skew"]),
                    Coding.from_json(p["coding"]) if p.get("coding") else None,
                )
                for p in described
            )
        )
