"""What a pack will write and how big it is, and the index of what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moerun.families import shared_experts_of, top_k_of
from moerun.index import LayerRecords, StoreIndex
from moerun.layout import RecordLayout
from moerun.source import ModelSource
from moerun.tensorfile import bytes_of, header_of

_SPARE_BYTES = 16 << 20  # index, tokenizer, and what the file system itself takes
_PACKAGES = ("torch", "transformers", "hqq", "safetensors")


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What a pack will write, known before it starts."""

    precision: str
    dense_precision: str
    layout: RecordLayout
    n_layers: int
    n_experts: int
    dense_bytes: int

    @property
    def n_records(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def total_bytes(self) -> int:
        return self.n_records * self.layout.record_bytes + self.dense_bytes + _SPARE_BYTES


def plan_pack(model: ModelSource, precision: str, dense_precision: str) -> PackPlan:
    """Sizes of a pack. Raises RunError when the precision does not fit the model's shapes."""
    dense = model.dense_tensors()
    header, _ = header_of(dense)
    return PackPlan(
        precision=precision,
        dense_precision=dense_precision,
        layout=model.shape.record(precision),
        n_layers=len(model.layers),
        n_experts=model.n_experts,
        dense_bytes=len(header) + sum(bytes_of(dtype, shape) for dtype, shape in dense.values()),
    )


def build_index(
    model: ModelSource,
    plan: PackPlan,
    layers: tuple[LayerRecords, ...],
    *,
    name: str,
    revision: str | None,
    source_digest: str,
) -> StoreIndex:
    """The index of a finished pack."""
    dense = {
        tensor: bytes_of(dtype, shape) for tensor, (dtype, shape) in model.dense_tensors().items()
    }
    config = model.config
    return StoreIndex(
        model=name,
        revision=revision,
        model_type=config.model_type,
        top_k=top_k_of(config),
        n_shared_experts=shared_experts_of(config),
        precision=plan.precision,
        dense_precision=plan.dense_precision,
        dense_bytes=plan.dense_bytes,
        dense_skew=model.dense_skew(),
        layer_bytes=_layer_bytes(dense, model.layers),
        token_bytes=_token_bytes(dense, config),
        shape=model.shape,
        layout=plan.layout,
        layers=layers,
        source_digest=source_digest,
        source_bytes=model.checkpoint.total_bytes,
        packages=_packages(),
    )


def _layer_bytes(dense: dict[str, int], layers: tuple[str, ...]) -> int:
    """Mean over MoE layers of what a layer has besides its routed experts."""
    # model.layers.3.mlp.experts -> model.layers.3.
    prefixes = tuple(f"{'.'.join(name.split('.')[:3])}." for name in layers)
    return sum(size for name, size in dense.items() if name.startswith(prefixes)) // len(layers)


def _token_bytes(dense: dict[str, int], config: Any) -> int:
    """One row of the embedding, and the head (the embedding again where they are tied)."""
    embedding: int = next((size for name, size in dense.items() if "embed_tokens" in name), 0)
    return embedding // int(config.vocab_size) + dense.get("lm_head.weight", embedding)


def _packages() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
