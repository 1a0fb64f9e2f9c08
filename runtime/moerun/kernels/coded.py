"""Multiplying by matrices that are kept in the bits of their publication.

A matrix is dequantised right before it is used, into memory that the matrices of a thread share,
and multiplied as the stock model's would be. So the products are those of the stock model that
transformers has dequantised, bit for bit, and no expert is dequantised that is not used.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.nn.functional as F

from moerun.format.coding import AT_ONCE_WEIGHTS, Coding, decode, scale_values
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.precision import Tensors
from moerun.format.tensorfile import bytes_of
from moerun.kernels.linears import parts_of

DECODING_BYTES = 16 * AT_ONCE_WEIGHTS
"""What torch's operations hold of the weights that they dequantise at once: codes, values and
scales."""
_PARALLEL_FROM = 1 << 20  # weights; fewer take less time than handing them to other threads


class Scratch(threading.local):
    """Memory for one dequantised matrix a thread, on one device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes, self._device = nbytes, device
        self._memory: torch.Tensor | None = None

    def matrix(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A matrix that lasts until the next call of this thread."""
        if self._memory is None:
            self._memory = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        return self._memory[: bytes_of(dtype, shape)].view(dtype).view(shape)


def scratch_bytes(shape: ExpertShape) -> int:
    """Bytes of memory that each thread dequantises the matrices of ``shape`` in."""
    return max(bytes_of(param.dtype, param.shape) for param in shape.params if param.is_matrix)


class CodedLinear:
    """A linear layer of FP8 or FP4 weights with scales of blocks."""

    def __init__(
        self, param: ExpertParam, views: dict[str, torch.Tensor], scratch: Scratch
    ) -> None:
        assert isinstance(param.coding, Coding)
        self._param, self._coding, self._scratch = param, param.coding, scratch
        self._parts = parts_of(param, views)
        self._bias = views.get(f"{param.name}_bias")

    def weight(self) -> torch.Tensor:
        """The matrix as the model multiplies by it; it lasts until the next one is needed."""
        weight = self._scratch.matrix(self._param.dtype, self._param.shape)
        return dequantise(self._parts, self._coding, weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[tokens, columns] -> y[tokens, rows]."""
        weight = self.weight()
        x = x.to(weight.dtype)
        y = x @ weight if self._param.transposed else F.linear(x, weight)
        return y if self._bias is None else y + self._bias


def dequantise(parts: Tensors, coding: Coding, out: torch.Tensor) -> torch.Tensor:
    """Write the weights of ``parts`` to ``out`` [rows, columns], as `decode` does: on the CPU by a
    compiled kernel, on other devices by torch's operations."""
    if out.device.type != "cpu" or out.dtype not in (torch.bfloat16, torch.float32):
        return decode(parts, coding, out)
    from moerun.kernels import coded_cpu

    kernel = coded_cpu.KERNELS[coding.elements, out.dtype]
    codes, scales = parts["codes"].numpy(), scale_values(parts["scales"]).numpy()
    bits = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
    block_rows, block_columns = coding.block
    threads = torch.get_num_threads() if out.numel() >= _PARALLEL_FROM else 1
    rows = len(codes)
    if threads == 1:
        kernel(codes, scales, block_rows, block_columns, 0, rows, bits)
        return out
    step = -(-rows // threads)
    waiting = [
        _pool(threads).submit(
            kernel, codes, scales, block_rows, block_columns, first, min(first + step, rows), bits
        )
        for first in range(0, rows, step)
    ]
    for done in waiting:
        done.result()
    return out


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "dequantise")
