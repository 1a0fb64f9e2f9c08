"""Multiplying by one packed matrix where it lies, one class a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F

from moerun.errors import RunError
from moerun.format.bitplanes import pack_codes, unpack_codes
from moerun.format.expert import ExpertParam
from moerun.format.precision import KERNEL_GROUP, ROWS, Scheme, Tensors
from moerun.kernels.cpu_prompt import multiply_blockwise, pays_from_tokens


class Linear(Protocol):
    """One matrix, ready to compute."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[T, K] through the matrix [N, K], with its bias where it has one: [T, N]."""


class PlainLinear:
    """A linear layer of floating-point weights."""

    def __init__(self, param: ExpertParam, views: dict[str, torch.Tensor]) -> None:
        self._weight, self._transposed = views[param.name], param.transposed
        self._bias = views.get(f"{param.name}_bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[tokens, columns] -> y[tokens, rows]."""
        x = x.to(self._weight.dtype)
        y = x @ self._weight if self._transposed else F.linear(x, self._weight)
        # As the stock experts add it: a fused addition may round differently.
        return y if self._bias is None else y + self._bias


class FusedLinear:
    """A linear layer of quantised weights on a GPU, dequantised inside the product."""

    def __init__(self, param: ExpertParam, scheme: Scheme, views: dict[str, torch.Tensor]) -> None:
        self._multiply = fused_multiply()
        self._parts, self._scheme = parts_of(param, views), scheme
        self._rows = param.rows_columns[0]
        self._bias = views.get(f"{param.name}_bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[tokens, columns] -> y[tokens, rows]."""
        y = self._multiply(x, self._parts, self._scheme, self._rows)
        return y if self._bias is None else y + self._bias


class NibbleLinear:
    """A linear layer of 2, 3 or 4 bits on a CPU, as nibbles in the order of its kernel."""

    def __init__(self, param: ExpertParam, scheme: Scheme, views: dict[str, torch.Tensor]) -> None:
        self._rows, self._columns = param.rows_columns
        nibbles = views.get(f"{param.name}.nibbles")
        if nibbles is None:
            nibbles = views[f"{param.name}.codes"]
        self._nibbles = nibbles.view(-1, self._columns // 2)
        self._terms = views[f"{param.name}.terms"]
        self._group, self._kernel_group = scheme.group, max(scheme.group, KERNEL_GROUP)
        self.blockwise_from = pays_from_tokens(scheme) if kernel_reads_nibbles() else None
        self._bias = views.get(f"{param.name}_bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[tokens, columns] -> y[tokens, rows]."""
        x = x.to(torch.bfloat16)
        if self.blockwise_from is not None and len(x) >= self.blockwise_from:
            y = multiply_blockwise(x, self._nibbles.view(-1), self._terms, self._group)
        elif len(self._terms) == 1:
            y = self._multiply(x, self._terms[0])
        else:
            y = self._multiply_in_turns(x)
        y = y[:, : self._rows]
        return y if self._bias is None else y + self._bias

    def _multiply(self, x: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self._nibbles, self._kernel_group, terms
        )
        return y

    def _multiply_in_turns(self, x: torch.Tensor) -> torch.Tensor:
        """Groups smaller than the kernel's: each turn sees one of them in every kernel group.

        The other columns of x are zero in that turn, so the scales they meet do not matter.
        """
        turns = len(self._terms)
        groups = x.reshape(len(x), -1, turns, self._group)
        y = None
        for turn, terms in enumerate(self._terms):
            seen = torch.zeros_like(groups)
            seen[:, :, turn] = groups[:, :, turn]
            part = self._multiply(seen.view(len(x), -1), terms)
            y = part if y is None else y + part
        assert y is not None
        return y


def fused_multiply() -> Callable[[torch.Tensor, Tensors, Scheme, int], torch.Tensor]:
    """The GPU's product of activations and quantised weights. Raises RunError without Triton."""
    try:
        from moerun.kernels.gpu import multiply
    except ImportError as error:
        raise RunError(
            "experts of 2, 3 or 4 bits are computed on a GPU by Triton, which is not here: "
            f"pip install triton, or pack with bf16 ({error})"
        ) from error
    return multiply


def parts_of(param: ExpertParam, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one parameter, by their names within it."""
    prefix = f"{param.name}."
    return {name.removeprefix(prefix): v for name, v in views.items() if name.startswith(prefix)}


@cache
def kernel_reads_nibbles() -> bool:
    """Whether torch's int4 kernel on this CPU reads the stored order (true with AVX-512)."""
    codes = torch.arange(ROWS * KERNEL_GROUP).remainder(13).view(ROWS, KERNEL_GROUP)
    stored = pack_codes(codes.to(torch.uint8), Scheme("probe", bits=4, group=64, lift=0))
    return torch.equal(kernel_order(codes).view(-1), stored["codes"])


def kernel_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes, uint8[rows, columns], packed in the order of torch's int4 kernel on this CPU."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        codes.to(torch.int32), 1
    )
    return packed


def to_kernel_order(nibbles: torch.Tensor, columns: int) -> None:
    """Bring stored nibbles into the order of this CPU's kernel, in place, block by block."""
    for block in nibbles.view(-1, ROWS * columns // 2):
        block.copy_(kernel_order(unpack_codes(block, columns)).view(-1))
