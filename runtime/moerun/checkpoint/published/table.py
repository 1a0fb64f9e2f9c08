"""The formats in which weights are published quantised: one entry of FORMATS each.

Publishers declare quantisation in several places and under several names, or not at all; the names
of the tensors always tell. So a format is recognised by its tensors, weight by weight, and what is
declared gives the rest: the size of blocks, the layout of words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moerun.checkpoint.published.blocks import BlockScaled, RowScaled
from moerun.checkpoint.published.compressed import CompressedTensors
from moerun.checkpoint.published.integers import Awq, Gptq
from moerun.checkpoint.published.mxfp4 import FusedMxfp4
from moerun.checkpoint.published.nvfp4 import ModelOptNvfp4
from moerun.checkpoint.published.reader import Names, Reader

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP4 = (torch.int8, torch.uint8)
UNQUANTISED = "give the unquantised checkpoint, 'moerun pack' quantises it itself"


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A format of quantised weights.

    name       the usual name
    endings    of names of tensors; a checkpoint that has all of them is in this format
    methods    what checkpoints in it declare as their method of quantisation
    names      how the tensors of a weight are named, one entry a variant; empty where it is not
               read
    reader     makes a weight of them
    published  models that are published so
    native     what "--precision native" keeps the experts in
    instead    what to do where it is not read
    """

    name: str
    endings: tuple[str, ...]
    methods: tuple[str, ...] = ()
    names: tuple[Names, ...] = ()
    reader: type[Reader] | None = None
    published: str = ""
    native: str = "16 bits, dequantised"
    instead: str = UNQUANTISED


def _weight(**parts: str) -> dict[str, str]:
    return {role: f".{ending}" for role, ending in parts.items()}


_PACKED = Names(
    ".weight",
    _weight(weight_packed="weight_packed", weight_scale="weight_scale"),
    "weight_packed",
    _weight(
        weight_shape="weight_shape",
        weight_zero_point="weight_zero_point",
        weight_global_scale="weight_global_scale",
        weight_g_idx="weight_g_idx",
    ),
)
_WORDS = _weight(words="qweight", zeros="qzeros", scales="scales")

# The first that matches counts, so those with more endings, or rarer ones, come first.
FORMATS = (
    QuantFormat(
        "GPTQ",
        (".qweight", ".g_idx"),
        ("gptq", "auto-round"),
        (Names(".weight", {**_WORDS, "g_idx": ".g_idx"}, "g_idx"),),
        Gptq,
        published="Qwen -GPTQ-Int4, of many others by their users",
    ),
    QuantFormat(
        "AWQ",
        (".qweight", ".qzeros"),
        ("awq", "auto-round"),
        (Names(".weight", _WORDS, "words"),),
        Awq,
        published="Qwen -AWQ, of many others by their users",
    ),
    QuantFormat(
        "MXFP4",
        ("_blocks", "_scales"),
        ("mxfp4",),
        (Names("", {"blocks": "_blocks", "scales": "_scales"}, "blocks"),),
        FusedMxfp4,
        published="gpt-oss-20b, gpt-oss-120b",
        native="MXFP4, 4.25 bits a weight",
    ),
    QuantFormat(
        "NVFP4",
        (".weight_scale_2",),
        ("modelopt", "nvfp4", "modelopt_fp4", "mixed_precision"),
        (
            Names(
                ".weight",
                _weight(codes="weight", scale="weight_scale", tensor_scale="weight_scale_2"),
                "tensor_scale",
                dtypes=(torch.uint8, torch.int8),
            ),
        ),
        ModelOptNvfp4,
        published="nvidia's -NVFP4 and -FP4 of DeepSeek, Qwen3, Llama 4",
    ),
    QuantFormat(
        "compressed-tensors NVFP4",
        (".weight_packed", ".weight_global_scale"),
        ("compressed-tensors",),
        (
            Names(
                ".weight",
                {**_PACKED.parts, "weight_global_scale": ".weight_global_scale"},
                "weight_global_scale",
            ),
        ),
        CompressedTensors,
        published="RedHatAI's -NVFP4",
    ),
    QuantFormat(
        "compressed-tensors",
        (".weight_packed",),
        ("compressed-tensors",),
        (_PACKED,),
        CompressedTensors,
        published="RedHatAI's -quantized.w4a16, Kimi-K2-Thinking",
        native="16 bits, dequantised; MXFP4 in its own bits",
    ),
    QuantFormat(
        "FP8 with scales of blocks",
        ("_scale_inv",),
        ("fp8", "mxfp8"),
        (Names("", {"codes": "", "scale": "_scale_inv"}, "scale", dtypes=_FP8 + _FP4),),
        BlockScaled,
        published="DeepSeek-V3, MiniMax-M2, Qwen3 -FP8",
        native="FP8, with the scales of its blocks",
    ),
    QuantFormat("bitsandbytes 4-bit", (".absmax", ".quant_map"), ("bitsandbytes",)),
    QuantFormat("bitsandbytes 8-bit", (".SCB",), ("bitsandbytes",)),
    QuantFormat("EXL2", (".q_weight", ".q_scale"), ("exl2",)),
    QuantFormat("EXL3", (".trellis",), ("exl3",)),
    QuantFormat("HQQ", (".W_q",), ("hqq",)),
    QuantFormat("AQLM", (".codebooks",), ("aqlm",)),
    QuantFormat("QuIP#", (".Qidxs",)),
    QuantFormat("Quanto", ("._data", "._scale"), ("quanto",)),
    QuantFormat("torchao", ("qdata", "scale"), ("torchao",)),
    QuantFormat("MLX", (".scales", ".biases")),
    QuantFormat(
        "FP8 with scales of tensors or rows",
        (".weight_scale",),
        ("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "quark", "mixed_precision"),
        (
            Names(
                ".weight",
                _weight(codes="weight", scale="weight_scale"),
                "scale",
                dtypes=(*_FP8, torch.int8),
            ),
        ),
        RowScaled,
        published="RedHatAI's -FP8-dynamic and -quantized.w8a8, nvidia's -FP8",
        native="FP8, with its scales; integers in 16 bits",
    ),
    QuantFormat(
        "FP8 and FP4 with E8M0 scales",
        (".scale",),
        ("fp8", "mxfp8"),
        (
            Names(".weight", _weight(codes="weight", scale="scale"), "scale", dtypes=_FP8 + _FP4),
            Names(".weight", _weight(codes="weight", scale="qscale_weight"), "scale", dtypes=_FP8),
        ),
        BlockScaled,
        published="DeepSeek-V4-Flash",
        native="FP8 or MXFP4, with the scales of its blocks",
    ),
    QuantFormat("8-bit weights with scales", (".weight_scales",)),
    QuantFormat("an FP8 KV cache", (".k_scale", ".v_scale")),
)

SPARE = (
    *(".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point"),
    *(".k_scale", ".v_scale", ".q_scale", ".output_scale", ".prob_output_scale"),
)
"""Endings of tensors by which activations or the KV cache would be quantised, which they are not
here."""


@dataclass(frozen=True, slots=True)
class Found:
    """A format, and a tensor by which it was recognised."""

    format: QuantFormat
    tensor: str


def find_format(names: Iterable[str]) -> Found | None:
    """The format whose endings the names of a checkpoint's tensors have; None where there is
    none."""
    known = tuple(names)
    for candidate in FORMATS:
        tellers = [next((n for n in known if n.endswith(e)), None) for e in candidate.endings]
        if tellers[0] is not None and all(tellers):
            return Found(candidate, tellers[0])
    return None


def formats_table() -> list[dict[str, str]]:
    """The formats as rows: name, models published so, whether they are read, and what
    "--precision native" keeps their experts in."""
    return [
        {
            "format": each.name,
            "published": each.published,
            "read": "yes" if each.reader else "no",
            "native": each.native if each.reader else "",
        }
        for each in FORMATS
    ]
