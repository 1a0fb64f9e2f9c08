"""What a decoded token needs of a layer beside matrices in blocks, on the CPU: jobs of
`decode_cpu`, made once and run for each token, in memory that is kept."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from moerun.format.block_scheme import BlockScheme
from moerun.format.layout import PART_ALIGN, align_up
from moerun.kernels.team import run_here, run_on_all

_CHUNKS_A_THREAD = 8
_FEW_TOKENS = 4  # that a matrix of bfloat16 is multiplied by as fast as it is read


class _TokenJob:
    """The words that compiled work reads."""

    def __init__(self, work: str, **words: int) -> None:
        from moerun.kernels import decode_cpu

        self.at: Any = getattr(decode_cpu, work.upper())
        self.work = decode_cpu.address_of(work)
        self.words: Any = (ctypes.c_int64 * self.at.last)()
        self.address = ctypes.addressof(self.words)
        for name, value in words.items():
            self.words[getattr(self.at, name)] = value


class TokenNorm:
    """An RMS norm of one token's hidden state, which may be added to first and rounded after."""

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        *,
        added: int = 0,
        rounded: int = 0,
        scheme: BlockScheme | None = None,
    ) -> None:
        """``weight``: bfloat16[width]. ``added``: the address of float32[width], 0: none;
        ``rounded``: where what comes out is to lie in 8 bits, 0: nowhere, else for matrices of
        ``scheme``."""
        self._held = weight, torch.tensor([eps], dtype=torch.float32)
        self._width, self._adds = len(weight), bool(added)
        kept, eps_at = (part.data_ptr() for part in self._held)
        self._job = _TokenJob("norm", weight=kept, eps=eps_at, width=len(weight), y=added)
        self._scratch = torch.empty(len(weight), dtype=torch.bfloat16)
        words, at = self._job.words, self._job.at
        words[at.rounded] = rounded
        if scheme is not None:
            words[at.zero], words[at.sums] = scheme.zero, scheme.sums_a_group
        words[at.out] = self._scratch.data_ptr()

    def round(self, x: torch.Tensor) -> None:
        """Norm x, bfloat16[..., width] of one token, for its 8 bits alone."""
        self._job.words[self._job.at.x] = x.data_ptr()
        run_here(self._job.work, self._job.address)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + what is added (x itself where nothing is), and that normed: both of x's shape."""
        words, at = self._job.words, self._job.at
        out = torch.empty_like(x)
        total = torch.empty_like(x) if self._adds else x
        words[at.x], words[at.total], words[at.out] = x.data_ptr(), total.data_ptr(), out.data_ptr()
        run_here(self._job.work, self._job.address)
        return total, out


class TokenAttention:
    """One token's attention, of queries, keys and values as they were projected."""

    def __init__(
        self,
        *,
        heads: int,
        group: int,
        width: int,
        projected: int,
        rounded: int,
        scheme: BlockScheme,
        scaling: float,
        bias: torch.Tensor | None,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> None:
        """``heads`` of keys and values, each with a ``group`` of queries, all ``width`` wide.

        ``projected``: the address of float32[(group + 2) * heads * width]; ``rounded``: where what
        comes out is to lie in 8 bits, for matrices of ``scheme``. ``bias`` and ``norms`` of queries
        and of keys: bfloat16.
        """
        self._group, self._width = group, width
        numbers = torch.tensor([eps, scaling], dtype=torch.float32)
        self._held = bias, norms, numbers
        self._job = _TokenJob("attend", heads=heads, group=group, width=width, projected=projected)
        words, at = self._job.words, self._job.at
        words[at.rounded] = rounded
        words[at.zero], words[at.sums] = scheme.zero, scheme.sums_a_group
        words[at.numbers] = numbers.data_ptr()
        words[at.bias] = 0 if bias is None else bias.data_ptr()
        if norms is not None:
            words[at.query_norm], words[at.key_norm] = (norm.data_ptr() for norm in norms)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_tokens = self._scratch_threads = 0

    def __call__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        """keys, values: bfloat16[1, heads, tokens, width], the last token's yet to be written;
        cosines, sines: bfloat16[..., width] of that token; mask: bool[..., tokens]."""
        words, at, tokens = self._job.words, self._job.at, keys.shape[2]
        self._have_scratch(tokens)
        words[at.next] = words[at.worker] = 0
        words[at.held] = tokens - 1
        words[at.keys], words[at.values] = keys.data_ptr(), values.data_ptr()
        words[at.head_bytes] = 2 * keys.stride(1)
        words[at.cosines], words[at.sines] = cosines.data_ptr(), sines.data_ptr()
        words[at.mask] = 0 if mask is None else mask.data_ptr()
        run_on_all(self._job.work, self._job.address)

    def _have_scratch(self, tokens: int) -> None:
        threads = torch.get_num_threads()
        if tokens <= self._scratch_tokens and threads <= self._scratch_threads:
            return
        from moerun.kernels.decode_cpu import scratch_bytes

        self._scratch_tokens = align_up(tokens, 256)
        self._scratch_threads = threads
        of_one = scratch_bytes(self._group, self._width, self._scratch_tokens)
        of_one = align_up(of_one, PART_ALIGN)
        self._scratch = torch.empty(threads * of_one, dtype=torch.uint8)
        words, at = self._job.words, self._job.at
        words[at.scratch], words[at.scratch_bytes] = self._scratch.data_ptr(), of_one


class HalvesLinear:
    """A matrix of bfloat16 times a few tokens, as fast as memory gives the matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: bfloat16[N, K], which is not copied."""
        self._weight = weight
        n, width = weight.shape
        self._n = n
        self._job = _TokenJob("rows", width=width, n=n, weight=weight.data_ptr())

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the kernel takes such a matrix."""
        from moerun.kernels.halves_ir import LANES

        plain = weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
        return plain and weight.is_contiguous() and weight.shape[1] % LANES == 0

    @staticmethod
    def takes(x: torch.Tensor) -> bool:
        """Whether x[..., K] is of few tokens, as they are multiplied here."""
        few = x.numel() <= _FEW_TOKENS * x.shape[-1]
        return few and x.dtype is torch.bfloat16 and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[..., K] -> y[..., N], bfloat16, of sums in float32."""
        words, at = self._job.words, self._job.at
        out = torch.empty(*x.shape[:-1], self._n, dtype=torch.bfloat16)
        words[at.x], words[at.out] = x.data_ptr(), out.data_ptr()
        words[at.tokens] = x.numel() // x.shape[-1]
        words[at.a_chunk] = max(1, self._n // (_CHUNKS_A_THREAD * torch.get_num_threads()))
        words[at.next] = 0
        run_on_all(self._job.work, self._job.address)
        return out


class ExpertChoice:
    """The experts of one token by the softmax of its gate's logits."""

    def __init__(self, n: int, top_k: int, dtype: torch.dtype, *, normalised: bool) -> None:
        """``dtype`` of the weights: bfloat16 or float32."""
        self._top_k, self._dtype = top_k, dtype
        self._scratch = torch.empty(n)
        self._job = _TokenJob("choose", n=n, top_k=top_k, normalised=normalised)
        words, at = self._job.words, self._job.at
        words[at.narrow] = dtype is torch.bfloat16
        words[at.scratch] = self._scratch.data_ptr()

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of logits bfloat16[1, n]: weights and ids [1, top_k], by descending weight."""
        words, at = self._job.words, self._job.at
        weights = torch.empty(1, self._top_k, dtype=self._dtype)
        ids = torch.empty(1, self._top_k, dtype=torch.int64)
        words[at.logits] = logits.data_ptr()
        words[at.weights], words[at.ids] = weights.data_ptr(), ids.data_ptr()
        run_here(self._job.work, self._job.address)
        return weights, ids


class _Sums(threading.local):
    """The jobs of each thread's sums, by the number of rows."""

    def __init__(self) -> None:
        self.jobs: dict[int, _TokenJob] = {}

    def job(self, n: int) -> _TokenJob:
        if n not in self.jobs:
            self.jobs[n] = _TokenJob("weigh", n=n)
        return self.jobs[n]


_sums = _Sums()


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of rows float32[n, width] and weights [1, n], bfloat16 or float32: bfloat16[1, width], summed
    in the order of the rows, in float32."""
    n, width = rows.shape
    job = _sums.job(n)
    words, at = job.words, job.at
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weights.dtype not in (torch.bfloat16, torch.float32):
        weights = weights.float()
    weights = weights.contiguous()
    out = torch.empty(1, width, dtype=torch.bfloat16)
    words[at.width], words[at.rows], words[at.row_bytes] = (
        width,
        rows.data_ptr(),
        4 * rows.stride(0),
    )
    words[at.weights], words[at.narrow] = weights.data_ptr(), weights.dtype is torch.bfloat16
    words[at.out] = out.data_ptr()
    run_here(job.work, job.address)
    return out
