"""What one expert of a model consists of, and the record it becomes at a precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moerun.format.block_scheme import BLOCK_SCHEMES, BlockScheme
from moerun.format.coding import Coding, Kept, kept_from_json
from moerun.format.layout import RecordLayout
from moerun.format.precision import NATIVE, PLAIN, PartSpec, scheme_of
from moerun.format.tensorfile import DTYPE_NAMES, DTYPES

KIND = "kind"
"""The first part of a record where records differ between layers: the number of their kind."""


@dataclass(frozen=True, slots=True)
class ExpertParam:
    """One parameter of the fused experts, without the dimension of the experts.

    `transposed`: a matrix [K, N] that multiplies from the right (x @ W), not [N, K].
    `skew`: bytes past a multiple of 64 at which stock transformers has every expert's (0 but for
    checkpoints with fused experts), which a product's last bit can depend on.
    `coding`: of a matrix that is published quantised, how native records keep it; computed in
    `dtype` where it is dequantised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    skew: int = 0
    coding: Kept | None = None

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
    """The parameters of one expert, in the order of their record.

    `others`: the same parameters where further layers keep them in other bits at native precision,
    as llama.cpp's Q4_K_M does. The records of all kinds of layers have one length, and begin with
    the number of their kind: so whoever holds a record knows what is in it.
    """

    params: tuple[ExpertParam, ...]
    others: tuple[tuple[ExpertParam, ...], ...] = ()

    @classmethod
    def matrix(cls, rows: int, columns: int, coding: Kept | None = None) -> ExpertShape:
        """A single matrix [rows, columns], such as a projection of attention; ``coding`` is how
        native records keep it."""
        return cls((ExpertParam("weight", (rows, columns), torch.bfloat16, coding=coding),))

    @property
    def n_weights(self) -> int:
        """Numbers in one expert's parameters, biases included."""
        return sum(math.prod(param.shape) for param in self.params)

    @property
    def kinds(self) -> tuple[ExpertShape, ...]:
        """The shape as each kind of layers keeps it, by number."""
        return (replace(self, others=()), *(ExpertShape(params) for params in self.others))

    def codings(self, precision: str) -> tuple[Kept, ...]:
        """How records at `precision` keep matrices in the bits of their publication, each way once;
        empty where they do not."""
        if precision != NATIVE:
            return ()
        params = [param for each in (self.params, *self.others) for param in each]
        return tuple(dict.fromkeys(param.coding for param in params if param.coding))

    def kept_as(self, precision: str) -> str | None:
        """What traces and reports call the bits of publication in which records at `precision` keep
        experts, such as fp8, mxfp4 or q4_k+q6_k; None where they do not."""
        return "+".join(sorted({each.name for each in self.codings(precision)})) or None

    def is_decoded(self, precision: str) -> bool:
        """Whether matrices at `precision` are dequantised each time that they are multiplied."""
        return any(isinstance(each, Coding) for each in self.codings(precision))

    def blocks(self, precision: str) -> tuple[BlockScheme, ...]:
        """The blocks of each matrix at `precision`; empty where they are not in blocks."""
        n_matrices = sum(param.is_matrix for param in self.params)
        if precision in BLOCK_SCHEMES:
            return (BLOCK_SCHEMES[precision],) * n_matrices
        codings = [param.coding for param in self.params if precision == NATIVE]
        return tuple(each for each in codings if isinstance(each, BlockScheme))

    def record(self, precision: str, kind: int = 0) -> RecordLayout:
        """The record of one expert at `precision`, of a `kind` of layers where they differ. Raises
        RunError when it does not exist."""
        if not self.others or not self.codings(precision):
            return self._layout(precision, [])
        tag: list[PartSpec] = [(KIND, torch.uint8, (1,))]
        layouts = [each._layout(precision, tag) for each in self.kinds]
        return replace(layouts[kind], record_bytes=max(each.record_bytes for each in layouts))

    def _layout(self, precision: str, tensors: list[PartSpec]) -> RecordLayout:
        """The record of these parameters, which begins with ``tensors``."""
        scheme = scheme_of(precision)
        tensors = list(tensors)
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
                    for part, dtype, shape in param.coding.parts(*param.shape)
                ]
            else:
                dtype = PLAIN.get(precision, param.dtype)
                tensors.append((param.name, dtype, param.shape))
        skews = {p.name: p.skew for p in self.params if PLAIN.get(precision, p.dtype) == p.dtype}
        return RecordLayout.of(tensors, skews)

    def to_json(self) -> dict[str, Any]:
        """The parameters, and those of other kinds of layers, as `from_json` reads them."""
        others = [_to_json(params) for params in self.others]
        return {"params": _to_json(self.params), **({"others": others} if others else {})}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> ExpertShape:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        others = tuple(_from_json(each) for each in described.get("others", ()))
        return cls(_from_json(described["params"]), others)


def _to_json(params: Sequence[ExpertParam]) -> list[dict[str, Any]]:
    return [
        {
            "name": param.name,
            "shape": list(param.shape),
            "dtype": DTYPE_NAMES[param.dtype],
            "transposed": param.transposed,
            "skew": param.skew,
            **({"coding": param.coding.to_json()} if param.coding else {}),
        }
        for param in params
    ]


def _from_json(described: Sequence[Mapping[str, Any]]) -> tuple[ExpertParam, ...]:
    return tuple(
        ExpertParam(
            p["name"],
            tuple(map(int, p["shape"])),
            DTYPES[p["dtype"]],
            bool(p["transposed"]),
            int(p["skew"]),
            kept_from_json(p["coding"]) if p.get("coding") else None,
        )
        for p in described
    )
