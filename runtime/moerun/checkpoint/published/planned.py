"""The bits of experts as config.json declares them, for plans of checkpoints that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moerun.checkpoint.published.mxfp4 import MX_BLOCK
from moerun.format.coding import Coding, finer
from moerun.format.expert import ExpertParam, ExpertShape

_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore")


def declared_coding(fields: Mapping[str, Any]) -> Coding | None:
    """How a configuration says that routed experts are published: gpt-oss's MXFP4, or E4M3 in
    blocks of weights as DeepSeek-V3's. None where it says another thing, or leaves experts out."""
    declared = fields.get("quantization_config") or {}
    left_out = [str(name) for key in _LEFT_OUT for name in declared.get(key) or ()]
    if any(".experts" in name for name in left_out):
        return None
    # DeepSeek-V4 declares the FP8 of its other weights; its experts are FP4.
    others = "expert_dtype" in fields or fields.get("model_type") == "deepseek_v4"
    match declared.get("quant_method"), declared.get("weight_block_size"):
        case "mxfp4", _:
            return Coding("e2m1", "e8m0", (MX_BLOCK, 1))
        case "fp8", [int(rows), int(columns)] if not others:
            return Coding("e4m3", "float32", (rows, columns))
    return None


def as_declared(shape: ExpertShape, coding: Coding | None) -> ExpertShape:
    """The expert with its matrices kept so at native precision, as `moerun pack` keeps them; as it
    is where one does not fit, or without a coding."""
    matrices = [param for param in shape.params if param.is_matrix]
    if coding is None or not all(coding.fits(param.shape) for param in matrices):
        return shape
    params = (_coded(param, coding) if param.is_matrix else param for param in shape.params)
    return ExpertShape(tuple(params))


def _coded(param: ExpertParam, coding: Coding) -> ExpertParam:
    rows, columns = (
        finer(block, size) for block, size in zip(coding.block, param.shape, strict=True)
    )
    return replace(param, coding=replace(coding, block=(rows, columns)))
