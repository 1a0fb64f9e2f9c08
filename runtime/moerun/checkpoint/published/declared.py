"""What the files of a checkpoint declare of its quantisation, in several places and forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeroute.jsontext import parse_json

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
class Declaration:
    """What a checkpoint's files say of its quantisation.

    method     by its usual name; None where none is named
    where      the file, and the key in it
    described  everything that is said there
    """

    method: str | None
    where: str
    described: Mapping[str, Any]

    def __str__(self) -> str:
        """Method and place, as part of a sentence."""
        return f"{self.method or 'quantised'}, as {self.where} says"


def declaration(path: Path) -> Declaration | None:
    """The quantisation that a checkpoint's files declare; None where nothing is declared.

    Declarations are searched for in config.json at any depth, and in the separate files of some
    tools.
    """
    for file, keys in (("config.json", _CONFIG_KEYS), *((name, ()) for name in _SIDE_FILES)):
        described = _read(path / file)
        for key, found in _declarations(described, keys):
            return Declaration(_method(found), f"{file}'s {key}" if key else file, found)
    return None


def declared(path: Path) -> str | None:
    """The quantisation that a checkpoint's files declare, and the place, as part of a sentence.
    None where nothing is declared."""
    found = declaration(path)
    return str(found) if found else None


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
        described = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
