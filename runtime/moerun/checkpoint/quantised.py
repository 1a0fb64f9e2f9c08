"""How a checkpoint is quantised, by its tensors and by what its files declare.

Publishers declare it in several places and under several names, or not at all; the names of the
tensors do not lie. A format is one entry of FORMATS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
_SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_METHOD_KEYS = ("quant_method", "quant_algo", "quant_type")
# What declarations without a method have, and which method has it.
_SIGNS = (
    ("desc_act", "gptq"),
    ("w_bit", "awq"),
    ("q_group_size", "awq"),
    ("load_in_4bit", "bitsandbytes"),
)


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A format of quantised weights.

    name     as people know it
    endings  of names of tensors; a checkpoint that has all of them is in this format
    """

    name: str
    endings: tuple[str, ...]


# The first that matches counts, so those with more endings, or rarer ones, come first.
FORMATS = (
    QuantFormat("GPTQ", (".qweight", ".g_idx")),
    QuantFormat("AWQ (or GPTQ without g_idx)", (".qweight", ".qzeros")),
    QuantFormat("MXFP4", ("_blocks", "_scales")),
    QuantFormat("NVFP4", (".weight_scale_2",)),
    QuantFormat("compressed-tensors NVFP4", (".weight_packed", ".weight_global_scale")),
    QuantFormat("compressed-tensors", (".weight_packed",)),
    QuantFormat("FP8 with scales of blocks", (".weight_scale_inv",)),
    QuantFormat("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    QuantFormat("bitsandbytes 8-bit", (".SCB",)),
    QuantFormat("EXL2", (".q_weight", ".q_scale")),
    QuantFormat("EXL3", (".trellis",)),
    QuantFormat("HQQ", (".W_q",)),
    QuantFormat("AQLM", (".codebooks",)),
    QuantFormat("QuIP#", (".Qidxs",)),
    QuantFormat("Quanto", ("._data", "._scale")),
    QuantFormat("torchao", ("qdata", "scale")),
    QuantFormat("MLX", (".scales", ".biases")),
    QuantFormat("8-bit weights with scales", (".weight_scale",)),
    QuantFormat("8-bit weights with scales", (".weight_scales",)),
    QuantFormat("8-bit weights with scales", (".scale",)),
    QuantFormat("an FP8 KV cache", (".k_scale", ".v_scale")),
)


@dataclass(frozen=True, slots=True)
class Found:
    """A format, and a tensor that tells it."""

    format: QuantFormat
    tensor: str


def find_format(names: Iterable[str]) -> Found | None:
    """The format that the names of a checkpoint's tensors have the endings of."""
    known = tuple(names)
    for candidate in FORMATS:
        tellers = [next((n for n in known if n.endswith(e)), None) for e in candidate.endings]
        if tellers[0] is not None and all(tellers):
            return Found(candidate, tellers[0])
    return None


def declared(path: Path) -> str | None:
    """The quantisation that a checkpoint's files declare, and where, as part of a sentence.

    It is looked for in config.json at any depth, and in the files of their own that some tools
    write. None where nothing is declared.
    """
    for file, keys in (("config.json", _CONFIG_KEYS), *((name, ()) for name in _SIDE_FILES)):
        described = _read(path / file)
        for key, found in _declarations(described, keys):
            where = f"{file}'s {key}" if key else file
            return f"{_method(found) or 'quantised'}, as {where} says"
    return None


def _declarations(
    described: Mapping[str, Any], keys: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every non-empty declaration under one of `keys`, with its key; without keys the whole."""
    if not keys:
        if described:
            yield "", described
        return
    for key, value in described.items():
        if isinstance(value, dict):
            if key in keys and value:
                yield key, value
            yield from ((f"{key}.{inner}", found) for inner, found in _declarations(value, keys))


def _method(described: Mapping[str, Any]) -> str | None:
    nested = [value for value in described.values() if isinstance(value, dict)]
    for level in (described, *nested):
        for key in _METHOD_KEYS:
            if isinstance(level.get(key), str):
                return str(level[key])
    return next((method for sign, method in _SIGNS if sign in described), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
