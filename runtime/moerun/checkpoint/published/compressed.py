"""compressed-tensors' packed formats, decompressed by their own library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from moerun.checkpoint.published.blocks import BlockScaled
from moerun.checkpoint.published.reader import Coded, Header, Headers, MisfitError
from moerun.errors import RunError
from moerun.format.coding import Coding
from moerun.format.precision import Tensors


def library() -> Any:
    """The library; RunError that says how to install it where it is missing."""
    try:
        import compressed_tensors
    except ImportError as error:
        raise RunError(
            "a checkpoint in this format is read by the package compressed-tensors, which is not "
            "here: pip install compressed-tensors"
        ) from error
    return compressed_tensors


class CompressedTensors:
    """Integers and FP4 values packed as `weight_packed`: what the scheme in config.json says.

    MXFP4 is kept in its own bits: bytes of two values, and for each 32 values a byte of scale,
    which no other scheme has.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        library()
        from compressed_tensors.quantization import QuantizationConfig

        self._blocks = BlockScaled({})

        if not described.get("config_groups"):
            raise RunError(
                "its config.json has no quantization_config with config_groups, without which "
                "compressed-tensors cannot be read: give the config.json of these weights"
            )
        known = {k: v for k, v in described.items() if k in QuantizationConfig.model_fields}
        try:
            self._config = QuantizationConfig.model_validate(known)
        except ValueError as error:  # pydantic's
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"its config.json's quantization_config cannot be used ({reason}): give the "
                "config.json of these weights"
            ) from error

    def shape(self, name: str, headers: Headers) -> tuple[int, ...]:
        """[N, K], or of a fused weight [E, N, K]."""
        bits = self._scheme(name).weights.num_bits
        packed, scale = headers["weight_packed"], headers["weight_scale"].shape
        columns = packed.shape[-1] * packed.dtype.itemsize * 8 // bits
        shape = (*packed.shape[:-1], columns)
        group = self._scheme(name).weights.group_size
        if group and group > 0:
            groups = -(-columns // group)
            if scale != (*shape[:-1], groups):
                raise MisfitError(
                    f"scales {list(scale)} do not fit a weight {list(shape)} in groups of {group}"
                )
        return shape

    def dequantise(self, name: str, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """As the library decompresses it."""
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(name)
        chosen = scheme.format or self._config.format
        compressor = BaseCompressor.get_value_from_registry(getattr(chosen, "value", chosen))
        state = dict(parts)
        if "weight_shape" not in state:
            rows, columns = self.shape(name, {r: Header.of(p) for r, p in parts.items()})
            state["weight_shape"] = torch.tensor([rows, columns])
        made: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        return made.to(dtype).contiguous()

    def coding(self, headers: Headers) -> Coding | None:
        """Of MXFP4; None for other schemes."""
        renamed = _as_blocks(headers)
        if any(header.dtype is not torch.uint8 for header in renamed.values()):
            return None
        return self._blocks.coding(renamed)

    def coded(self, parts: Tensors) -> Coded:
        """The codes and exponents of MXFP4."""
        return self._blocks.coded(_as_blocks(parts))

    def _scheme(self, name: str) -> Any:
        """The group of config.json that a weight belongs to: by its name, else by its class."""
        from compressed_tensors.utils.match import match_name

        module = name.removesuffix(".weight")
        groups = list(self._config.config_groups.values())
        named = (g for g in groups if any(match_name(module, target) for target in g.targets))
        linear = (g for g in groups if "Linear" in g.targets)
        scheme = next(named, next(linear, None))
        if scheme is None or scheme.weights is None:
            raise MisfitError("no group of config.json's quantization_config is for it")
        return scheme


Part = TypeVar("Part")


def _as_blocks(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Codes and scales under the names of `BlockScaled`."""
    return {"codes": parts["weight_packed"], "scale": parts["weight_scale"]}
