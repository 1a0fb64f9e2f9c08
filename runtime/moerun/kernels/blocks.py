"""Multiplying by matrices and whole experts in llama.cpp's blocks, on the CPU.

`blocks_cpu` has the compiled work, `team` the threads; here is what they are given.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from moerun.format.block_scheme import BLOCK_SCHEMES, TILE_ROWS, BlockScheme
from moerun.format.expert import ExpertParam
from moerun.format.layout import PART_ALIGN, align_up
from moerun.kernels.team import run_here, run_on_all

_CHUNKS_A_THREAD = 8  # more would share the work out better, and cost more to claim
_LEAST_CHUNK_BYTES = 1 << 14
_KEPT_TOKENS = 4  # what a decoded token needs is made once; a prompt's memory is given back


class BlockLinear:
    """A linear layer of weights in blocks, of activations that it rounds to 8 bits."""

    def __init__(
        self, param: ExpertParam, scheme: BlockScheme, views: dict[str, torch.Tensor]
    ) -> None:
        self.rows, self.columns = param.rows_columns
        self.scheme = scheme
        self._held = views[f"{param.name}.codes"], views[f"{param.name}.scales"]
        self.addresses = [part.data_ptr() for part in self._held]
        self.bias = views.get(f"{param.name}_bias")
        self._sizes = scheme.name, self.rows, self.columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[tokens, columns] -> y[tokens, rows], float32."""
        y: torch.Tensor = _kept.plan(_LinearPlan, self._sizes, 1, len(x))(x, self.addresses)
        return y if self.bias is None else y + self.bias


class BlockExpert:
    """The matrices of an expert whose gate is a SiLU, computed without leaving compiled code."""

    def __init__(self, up: BlockLinear, down: BlockLinear) -> None:
        """``up`` has the gate's rows above those of the up projection."""
        self.up, self.down = up, down
        self.sizes = f"{up.scheme.name} {down.scheme.name}", up.columns, down.columns, down.rows
        """By which experts can be computed together: blocks, and the sizes of the matrices."""

    @property
    def fits(self) -> bool:
        """Whether it can be computed so: without biases, and with whole blocks of both halves."""
        up, down = self.up, self.down
        whole = up.rows == 2 * down.columns and down.columns % down.scheme.group == 0
        return whole and up.bias is None and down.bias is None


def compute_experts(experts: Sequence[BlockExpert], x: torch.Tensor) -> torch.Tensor:
    """x[T, H] through each of the experts, which are of one shape: [experts, T, H], float32."""
    plan = _kept.plan(_ExpertsPlan, experts[0].sizes, len(experts), len(x))
    ups, downs = [], []
    for expert in experts:
        ups += expert.up.addresses
        downs += expert.down.addresses
    outputs: torch.Tensor = plan(x, ups, downs)
    return outputs


class _Kept(threading.local):
    """The plans of each thread, by what they are for."""

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}

    def plan(self, kind: Any, sizes: tuple[Any, ...], n: int, tokens: int) -> Any:
        threads = torch.get_num_threads()
        key = kind, sizes, n, tokens, threads
        found = self.plans.get(key)
        if found is None:
            schemes = [BLOCK_SCHEMES[name] for name in sizes[0].split()]
            found = kind(*schemes, *sizes[1:], n, tokens, threads)
            if tokens <= _KEPT_TOKENS:
                self.plans[key] = found
        return found


_kept = _Kept()


class _LinearPlan:
    """A matrix times some tokens: what does not change from one such product to the next."""

    def __init__(
        self, scheme: BlockScheme, rows: int, columns: int, n: int, tokens: int, threads: int
    ) -> None:
        self._rows, self._padded = rows, align_up(rows, TILE_ROWS)
        self._tokens = tokens
        self._multiply = _words().address_of("multiply", scheme)
        self._job = _BlockJob(scheme, columns, n, tokens)
        self._job.share_out(self._padded // TILE_ROWS, self._padded // TILE_ROWS, threads)
        self._job.set(out_stride=4 * tokens * self._padded)

    def __call__(self, x: torch.Tensor, addresses: list[int]) -> torch.Tensor:
        """x[T, columns] times the matrix whose codes and scales are at ``addresses``."""
        job = self._job
        job.take(x)
        out = torch.empty(self._tokens, self._padded)
        job.run(self._multiply, addresses, out.data_ptr())
        return out if self._rows == self._padded else out[:, : self._rows]


class JoinedLinears:
    """Matrices that the same single token is multiplied by, in one call: queries, keys, values."""

    def __init__(self, linears: Sequence[BlockLinear]) -> None:
        """``linears`` are of one scheme and of as many columns, without biases."""
        first, threads = linears[0], torch.get_num_threads()
        scheme, columns = first.scheme, first.columns
        rows = math.gcd(*(linear.rows for linear in linears))
        self.rows = sum(linear.rows for linear in linears)
        # A job's matrices have as many rows each: larger ones are several below each other.
        block_rows = columns * scheme.bits // 8, columns // scheme.block * scheme.scale_bytes
        self._table = [
            address + start * row_bytes
            for linear in linears
            for start in range(0, linear.rows, rows)
            for address, row_bytes in zip(linear.addresses, block_rows, strict=True)
        ]
        n = self.rows // rows
        self._multiply = _words().address_of("multiply", scheme)
        self._job = _BlockJob(scheme, columns, n, 1)
        self._job.share_out(rows // TILE_ROWS, rows // TILE_ROWS, threads)
        self._out = torch.empty(self.rows)
        self._job.set(out_stride=4 * rows)
        self.scheme = scheme
        self.x = self._job.rounded_address
        """Where the token lies, rounded to 8 bits."""
        self.out = self._out.data_ptr()
        """Where the products lie, float32[rows]."""

    @staticmethod
    def fit(linears: Sequence[BlockLinear]) -> bool:
        """Whether they can be multiplied by so."""
        first = linears[0]
        alike = all((e.scheme, e.columns) == (first.scheme, first.columns) for e in linears)
        return alike and not any(e.rows % TILE_ROWS or e.bias is not None for e in linears)

    def run(self) -> None:
        """Multiply what lies at ``x``."""
        self._job.run(self._multiply, self._table, self.out)


class _ExpertsPlan:
    """Some tokens through experts: what does not change from one time to the next."""

    def __init__(
        self,
        above: BlockScheme,
        below: BlockScheme,
        columns: int,
        width: int,
        rows: int,
        n: int,
        tokens: int,
        threads: int,
    ) -> None:
        self._rows, self._padded = rows, align_up(rows, TILE_ROWS)
        self._n, self._tokens = n, tokens
        address_of = _words().address_of
        self._hide, self._multiply = address_of("hidden", above), address_of("multiply", below)
        self._up = _BlockJob(above, columns, n, tokens)
        self._up.share_out(2 * width // TILE_ROWS, width // above.group, threads)
        self._down = _BlockJob(below, width, n, tokens)
        self._down.share_out(self._padded // TILE_ROWS, self._padded // TILE_ROWS, threads)
        self._down.set(out_stride=4 * tokens * self._padded)
        n_bytes = _rounded_bytes(below, tokens, width)
        self._hidden = _memory(n * n_bytes)
        scratch_bytes = align_up(2 * 4 * tokens * below.group, PART_ALIGN)
        self._scratch = _memory(threads * scratch_bytes)
        self._up.set(out_stride=n_bytes, scratch_bytes=scratch_bytes)
        self._up.set(scratch=self._scratch.data_ptr())
        self._up.set(out_zero=below.zero, out_sums=below.sums_a_group)
        self._down.set(x=self._hidden.data_ptr(), x_stride=n_bytes)

    def __call__(self, x: torch.Tensor, ups: list[int], downs: list[int]) -> torch.Tensor:
        """x[T, columns] through the experts whose codes and scales are at these addresses."""
        self._up.take(x)
        self._up.run(self._hide, ups, self._hidden.data_ptr())
        out = torch.empty(self._n, self._tokens, self._padded)
        self._down.run(self._multiply, downs, out.data_ptr())
        return out if self._rows == self._padded else out[..., : self._rows]


class _BlockJob:
    """The words that compiled work reads, and memory for the activations that it multiplies."""

    def __init__(self, scheme: BlockScheme, columns: int, n: int, tokens: int) -> None:
        words = _words()
        self._at, self._round = words.at, words.round
        self._n, self._row_bytes = n, columns * scheme.bits // 8
        self._last = self._at.table + 2 * n
        self._job: Any = (ctypes.c_int64 * self._last)()
        self._address = ctypes.addressof(self._job)
        self._rounded = _memory(_rounded_bytes(scheme, tokens, columns))
        self.set(zero=scheme.zero, sums=scheme.sums_a_group, tokens=tokens)
        self.set(groups=columns // scheme.group, x=self._rounded.data_ptr())

    @property
    def rounded_address(self) -> int:
        """Where activations lie in 8 bits."""
        return self._rounded.data_ptr()

    def set(self, **words: int) -> None:
        """Set words by name."""
        for name, value in words.items():
            self._job[getattr(self._at, name)] = value

    def share_out(self, row_blocks: int, units: int, threads: int) -> None:
        """Divide the work on each matrix, ``units`` pieces of it, into chunks."""
        unit_bytes = self._row_bytes * TILE_ROWS * row_blocks // units
        even = self._n * units // (_CHUNKS_A_THREAD * threads)
        a_chunk = min(units, max(1, even, _LEAST_CHUNK_BYTES // unit_bytes))
        self.set(row_blocks=row_blocks, a_chunk=a_chunk, chunks=self._n * -(-units // a_chunk))

    def take(self, x: torch.Tensor) -> None:
        """Round x[T, K] to 8 bits: it is what is multiplied."""
        if x.dtype not in (torch.bfloat16, torch.float32):
            x = x.float()
        x = x.contiguous()
        job, at = self._job, self._at
        job[at.raw], job[at.raw_is_float] = x.data_ptr(), x.dtype is torch.float32
        run_here(self._round, self._address)

    def run(self, work: int, table: list[int], out: int) -> None:
        """Do compiled ``work`` on the matrices at the addresses of ``table``."""
        job, at = self._job, self._at
        job[at.next] = job[at.worker] = 0
        job[at.out] = out
        job[at.table : self._last] = [*table]
        run_on_all(work, self._address)


class _Words:
    """Where the words of a job are, and the compiled work; made once numba is needed."""

    def __init__(self) -> None:
        from moerun.kernels import blocks_cpu

        self.at = blocks_cpu.JOB
        self.round = blocks_cpu.address_of("round")
        self.address_of = blocks_cpu.address_of


_words = cache(_Words)


def _rounded_bytes(scheme: BlockScheme, tokens: int, columns: int) -> int:
    values = tokens * columns
    return align_up(values + 4 * (1 + scheme.sums_a_group) * values // scheme.group, PART_ALIGN)


def _memory(n_bytes: int) -> torch.Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8)
