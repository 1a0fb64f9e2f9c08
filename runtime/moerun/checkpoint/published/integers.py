"""AWQ and GPTQ: integers packed in 32-bit words, with scales and zeros of groups.

Their own libraries need a GPU or a compiler to install. The words are unpacked by the library of
compressed-tensors, which reads these layouts, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moerun.checkpoint.published.compressed import library
from moerun.checkpoint.published.reader import Dequantising, Header, Headers, MisfitError
from moerun.errors import RunError
from moerun.format.precision import Tensors

_WORD = 32


class Gptq(Dequantising):
    """GPTQ: words packed along the inputs, qweight int32[K * bits / 32, N].

    weight[n, k] = (q[k, n] - zero[g, n]) x scale[g, n] with g = g_idx[k]. Stored zeros are one too
    small, but for `checkpoint_format` gptq_v2.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        stated = described.get("checkpoint_format") or "gptq"
        if stated not in ("gptq", "gptq_v2"):
            raise RunError(
                f"it has the GPTQ layout {stated!r}, which is not read: give a checkpoint in the "
                "layout gptq or gptq_v2, or an unquantised one"
            )
        self._zero_is_less = stated == "gptq"
        self._bits = int(described.get("bits") or 4)

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """[N, K]."""
        words, scales = headers["words"].shape, headers["scales"].shape
        if len(words) != 2 or len(scales) != 2 or words[1] != scales[1]:
            raise MisfitError(f"words {list(words)} do not fit scales {list(scales)}")
        inputs, bits = self._inputs(headers)
        groups, outputs = scales
        zeros = headers["zeros"].shape
        uneven = "g_idx" not in headers and inputs % groups
        if uneven or zeros != (groups, outputs * bits // _WORD):
            raise MisfitError(
                f"scales {list(scales)} and zeros {list(zeros)} do not fit {bits}-bit words "
                f"{list(words)}"
            )
        return outputs, inputs

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """In float32, rounded once."""
        scales = parts["scales"].float()
        groups, outputs = scales.shape
        inputs, bits = self._inputs({r: Header.of(part) for r, part in parts.items()})
        codes = _unpack(parts["words"], bits, (inputs, outputs), 0)
        zeros = _unpack(parts["zeros"], bits, (groups, outputs), 1) + self._zero_is_less
        group = parts.get("g_idx")
        if group is None:
            group = torch.arange(inputs) // (inputs // groups)
        if int(group.min()) < 0 or int(group.max()) >= groups:
            raise RunError(f"{name} has a g_idx beyond its {groups} groups: download it again")
        weight = (codes - zeros[group.long()]) * scales[group.long()]
        return weight.T.to(dtype).contiguous()

    def _inputs(self, headers: Headers) -> tuple[int, int]:
        """The input columns, and the bits of a weight, which may differ from module to module."""
        rows = headers["words"].shape[0]
        if "g_idx" not in headers:
            return rows * _WORD // self._bits, self._bits
        (inputs,) = headers["g_idx"].shape
        bits = rows * _WORD // max(inputs, 1)
        if not 1 <= bits <= 8 or rows * _WORD != bits * inputs:
            raise MisfitError(f"words {list(headers['words'].shape)} do not fit g_idx [{inputs}]")
        return inputs, bits


class Awq(Dequantising):
    """AWQ's GEMM layout: qweight int32[K, N / 8], the eight outputs of a word out of order."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        version = str(described.get("version") or "gemm").lower()
        if version != "gemm":
            raise RunError(
                f"it has the AWQ layout {version!r}, which is not read: give a checkpoint in the "
                "layout gemm, or an unquantised one"
            )

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """[N, K]."""
        words, zeros, scales = (headers[r].shape for r in ("words", "zeros", "scales"))
        if len(words) != 2 or len(scales) != 2 or words[1] * 8 != scales[1]:
            raise MisfitError(f"4-bit words {list(words)} do not fit scales {list(scales)}")
        inputs, (groups, outputs) = words[0], scales
        if inputs % groups or zeros != (groups, outputs // 8):
            raise MisfitError(
                f"scales {list(scales)} and zeros {list(zeros)} do not fit words {list(words)}"
            )
        return outputs, inputs

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """By compressed-tensors' converter, in float32, rounded once."""
        library()
        from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter as Converter

        codes, zeros = Converter.unpack_awq(parts["words"], parts["zeros"], 4)
        codes, zeros = Converter.reverse_awq_order(codes, zeros, 4)
        inputs, groups = len(codes), len(zeros)
        group = torch.arange(inputs) // (inputs // groups)
        scales = parts["scales"].float()
        weight: torch.Tensor = ((codes & 15) - (zeros & 15)[group]) * scales[group]
        return weight.T.to(dtype).contiguous()


def _unpack(words: torch.Tensor, bits: int, shape: tuple[int, int], dim: int) -> torch.Tensor:
    """Unsigned integers of ``shape``, int32, from words packed along a dimension."""
    library()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    # The library's are signed.
    signed: torch.Tensor = unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim)
    return signed.int() + (1 << (bits - 1))
