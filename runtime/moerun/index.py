"""`index.json` of an expert store: what is stored, how a record is laid out, where each lies."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerun.errors import RunError
from moerun.layout import RecordLayout
from moerun.shape import ExpertShape

INDEX_FILE = "index.json"
DENSE_FILE = "dense.safetensors"
FORMAT = "moerun expert store"
FORMAT_VERSION = 1


def experts_file(layer: int) -> str:
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """The records of one MoE layer: their file, and for each expert offset and CRC-32."""

    module: str  # of the model, e.g. model.layers.3.mlp.experts
    file: str
    file_bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """Everything that is known of a store without reading its weights.

    `layer_bytes` are the weights of one MoE layer besides its routed experts (mean over layers),
    `token_bytes` what one token reads of embedding and head. `dense_skew` are the dense tensors
    that stock transformers computes at addresses off a multiple of 64: name and remainder.
    """

    model: str
    revision: str | None
    model_type: str
    top_k: int
    n_shared_experts: int
    precision: str
    dense_precision: str
    dense_bytes: int
    dense_skew: dict[str, int]
    layer_bytes: int
    token_bytes: int
    shape: ExpertShape
    layout: RecordLayout
    layers: tuple[LayerRecords, ...]
    source_digest: str
    source_bytes: int
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_experts(self) -> int:
        return len(self.layers[0].offsets)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": {
                "name": self.model,
                "revision": self.revision,
                "type": self.model_type,
                "layers": self.n_layers,
                "experts": self.n_experts,
                "top_k": self.top_k,
                "shared_experts": self.n_shared_experts,
            },
            "source": {"digest": self.source_digest, "bytes": self.source_bytes},
            "dense": {
                "precision": self.dense_precision,
                "bytes": self.dense_bytes,
                "skew": self.dense_skew,
                "layer_bytes": self.layer_bytes,
                "token_bytes": self.token_bytes,
            },
            "expert": {
                "precision": self.precision,
                "params": self.shape.to_json(),
                "record": self.layout.to_json(),
            },
            "layers": [
                {
                    "module": layer.module,
                    "file": layer.file,
                    "bytes": layer.file_bytes,
                    "offsets": list(layer.offsets),
                    "crc32": list(layer.crc32),
                }
                for layer in self.layers
            ],
            "packages": self.packages,
        }

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> StoreIndex:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        model, dense, expert = described["model"], described["dense"], described["expert"]
        layers = tuple(
            LayerRecords(
                layer["module"],
                layer["file"],
                int(layer["bytes"]),
                tuple(map(int, layer["offsets"])),
                tuple(map(int, layer["crc32"])),
            )
            for layer in described["layers"]
        )
        if not layers or any(
            len(layer.offsets) != int(model["experts"]) or len(layer.crc32) != len(layer.offsets)
            for layer in layers
        ):
            raise ValueError("layers and experts do not match")
        return cls(
            model=model["name"],
            revision=model["revision"],
            model_type=model["type"],
            top_k=int(model["top_k"]),
            n_shared_experts=int(model["shared_experts"]),
            precision=expert["precision"],
            dense_precision=dense["precision"],
            dense_bytes=int(dense["bytes"]),
            dense_skew={name: int(skew) for name, skew in dense["skew"].items()},
            layer_bytes=int(dense["layer_bytes"]),
            token_bytes=int(dense["token_bytes"]),
            shape=ExpertShape.from_json(expert["params"]),
            layout=RecordLayout.from_json(expert["record"]),
            layers=layers,
            source_digest=described["source"]["digest"],
            source_bytes=int(described["source"]["bytes"]),
            packages=dict(described["packages"]),
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none."""
    partial = path.with_name(f"{path.name}.new")
    with partial.open("w") as file:
        json.dump(content, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_index(folder: Path) -> StoreIndex:
    """Raises RunError when the folder holds no store that this version reads."""
    path = folder / INDEX_FILE
    try:
        described = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        hint = "the folder of a pack that was finished" if folder.is_dir() else "an existing folder"
        raise RunError(
            f"{folder} holds no expert store (no {INDEX_FILE}): give {hint}, or make one with "
            "'moerun pack'"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON: pack the store again") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise RunError(
            f"{path} is not the index of an expert store: give a folder made by 'moerun pack'"
        )
    if described.get("version") != FORMAT_VERSION:
        raise RunError(
            f"{path} has store format version {described.get('version')!r}, this moerun reads "
            f"{FORMAT_VERSION}: pack the store again"
        )
    try:
        return StoreIndex.from_json(described)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): pack the store again") from error
