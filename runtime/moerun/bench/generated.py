"""Models of random weights, and expert stores of them without a checkpoint or a disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from moeroute.models import dense_sizes

from moerun.bench.random_weights import (
    RandomAttention,
    RandomDense,
    RandomRecords,
    TensorShapes,
    laid_out,
)
from moerun.checkpoint.families import (
    count_experts,
    empty_model,
    expert_shape,
    find_experts,
    shared_experts_of,
    top_k_of,
    vocabulary_of,
)
from moerun.checkpoint.published.planned import as_declared
from moerun.errors import RunError
from moerun.format.block_scheme import BlockScheme
from moerun.format.coding import Coding
from moerun.format.expert import ExpertShape
from moerun.format.precision import NATIVE, PLAIN, Precisions
from moerun.offload.attention import install_attention
from moerun.offload.experts import IMPLEMENTATION, register
from moerun.offload.load import rebuild_buffers
from moerun.store.expert_store import ExpertStore
from moerun.store.index import LayerRecords, StoreIndex, experts_file
from moerun.store.progress import RecordProgress
from moerun.store.reading import Pieces, Read
from moerun.versions import store_packages


class Published(NamedTuple):
    """What native records of a checkpoint keep in its own bits."""

    expert: ExpertShape
    attention: Mapping[str, BlockScheme]  # projections by module


class GeneratedModel:
    """A model of a configuration whose weights are drawn as they are asked for."""

    def __init__(
        self,
        config: Any,
        *,
        name: str,
        precision: str,
        seed: int,
        attention: str = NATIVE,
        published: Published | None = None,
        declared: Coding | None = None,
    ) -> None:
        """``precision`` is the experts'; both precisions are chosen from as for a pack.
        ``published`` is of a checkpoint whose native records keep its bits. ``declared`` is how
        the configuration says that experts are published, where no checkpoint is here.

        Raises RunError where one does not fit the configuration's matrices.
        """
        register()
        self.name = name
        self.config = config
        self.seed = seed
        self.precisions = Precisions.chosen(precision, attention, None)
        native = config.dtype or torch.bfloat16
        self.dtype = PLAIN.get(self.precisions.dense, native)
        self._model: Any = empty_model(config, self.dtype, experts=IMPLEMENTATION)
        found = find_experts(self._model)
        if not found:
            raise RunError(f"{name} has no layers with experts: keep more of its layers")
        self._modules = [module for module, _ in found]
        self.n_experts = count_experts(found[0][1])
        plain = expert_shape(found[0][1], native)
        self.shape = published.expert if published else as_declared(plain, declared)
        self.records = RandomRecords(self.shape, precision, seed)
        for _, module in found:
            for parameter, _ in list(module.named_parameters(recurse=False)):
                setattr(module, parameter, None)
        self.attention: RandomAttention | None = None
        kept = published.attention if published and self.precisions.keeps_all else {}
        if self.precisions.packs_attention or kept:
            self.attention = RandomAttention(self._model, self.precisions.attention, seed, kept)
        buffers = self._buffers()
        self.dense = RandomDense(self._dense_tensors() | buffers, seed, buffers)
        self.index = self._index()

    def at(self, precision: str) -> GeneratedModel:
        """The same model with its experts at another precision."""
        other = copy.copy(self)
        other.precisions = replace(self.precisions, expert=precision)
        other.records = RandomRecords(self.shape, precision, self.seed)
        other.index = other._index()
        return other

    def build(self, store: ExpertStore, device: torch.device) -> Any:
        """The model, ready to run but for its experts: dense weights and packed attention are
        read from ``store``. Once."""
        model = self._model
        install_attention(model, store, device)
        state = dict(store.read_dense(device))
        model.load_state_dict(state, strict=False, assign=True)
        model.requires_grad_(False)
        model.tie_weights()
        rebuild_buffers(model, device)
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_model_config(self.config)
        return model

    def record_lengths(self) -> dict[str, int]:
        """Lengths of a layer's records in bytes, by the names of the records in the file."""
        return {f"expert.{e}": self.records.record_bytes for e in range(self.n_experts)}

    def _dense_tensors(self) -> TensorShapes:
        """All parameters but the experts' and packed attention's."""
        packed = {f"{module}.weight" for module in self._packed_bytes()}
        return {
            name: (parameter.dtype, tuple(parameter.shape))
            for name, parameter in self._model.named_parameters()
            if name not in packed
        }

    def _buffers(self) -> TensorShapes:
        """What a checkpoint has besides parameters: biases of the ranking, tables of tokens."""
        kept = self._model.state_dict().keys()
        return {
            name: (buffer.dtype, tuple(buffer.shape))
            for name, buffer in self._model.named_buffers()
            if name in kept
        }

    def _packed_bytes(self) -> dict[str, int]:
        """Lengths of attention's records, by module; empty where attention is not packed."""
        return self.attention.record_bytes if self.attention else {}

    def _index(self) -> StoreIndex:
        dense = self.dense.n_bytes
        vocabulary = vocabulary_of(self.config)
        sizes = dense_sizes(dense | self._packed_bytes(), self._modules, vocabulary)
        return StoreIndex(
            model=self.name,
            revision=None,
            model_type=self.config.model_type,
            top_k=top_k_of(self.config),
            n_shared_experts=shared_experts_of(self.config),
            precision=self.precisions.expert,
            dense_precision=self.precisions.dense,
            dense_bytes=sum(dense.values()),
            dense_skew={},
            layer_bytes=sizes.layer_bytes,
            token_bytes=sizes.token_bytes,
            shape=self.shape,
            layout=self.records.layout,
            layers=self._layers(),
            source_digest=f"random weights, seed {self.seed}",
            source_bytes=0,
            packages=store_packages(),
            attention=self.attention.described() if self.attention else None,
        )

    def _layers(self) -> tuple[LayerRecords, ...]:
        """Where each layer's records lie, were they in a file; the checksums are not known."""
        file_bytes, offsets = laid_out(self.record_lengths())
        crc32 = (0,) * self.n_experts
        return tuple(
            LayerRecords(module, experts_file(i), file_bytes, tuple(offsets), crc32)
            for i, module in enumerate(self._modules)
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts together."""
        return self.index.n_layers * self.n_experts * self.records.record_bytes

    @property
    def weights_bytes(self) -> int:
        """Bytes of all other weights, as they are stored."""
        attention = self.index.attention
        return self.index.dense_bytes + (attention.file_bytes if attention else 0)


class GeneratedStore(ExpertStore):
    """A store that is nowhere on a disk: its records are drawn, or held in memory."""

    def __init__(
        self, model: GeneratedModel, *, held: bool, progress: RecordProgress | None = None
    ):
        """``held``: draw every record now; else each time it is read, which is for a link that
        copies them all into memory of its own. Raises RunError where memory does not suffice."""
        super().__init__(Path(f"<random {model.index.model}>"), model.index)
        self._model = model
        self._records = model.records
        self._memory: torch.Tensor | None = None
        if not held:
            return
        try:
            self._memory = torch.empty((self.n_keys, self.record_bytes), dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise RunError(f"no memory for {model.expert_bytes / 1e9:.2f} GB of experts") from error
        for key, record in enumerate(self._memory):
            self._records.write(key, record)
            if progress:
                progress(key + 1, self.n_keys)

    def read_into(
        self,
        key: int,
        buffer: torch.Tensor,
        *,
        read: Read | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """Draw or copy a record into ``buffer``; ``read`` is not called, no checksum compared."""
        if self._memory is None:
            self._records.write(key, buffer)
            return
        for piece in pieces(self.record_bytes) if pieces else (slice(None),):
            buffer[piece].copy_(self._memory[key][piece])

    def read_attention(self, module: str, buffer: torch.Tensor) -> None:
        """Draw the record of an attention matrix into ``buffer``, uint8[record bytes]."""
        assert self._model.attention is not None
        self._model.attention.write(module, buffer)

    def config(self) -> Any:
        """Configuration of the generated model."""
        return self._model.config

    def dense_tensors(self) -> TensorShapes:
        """Shapes and types of the dense tensors, by name."""
        return dict(self._model.dense.tensors)

    def read_dense(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Draw the dense tensors one by one, each with its name."""
        return ((name, tensor.to(device)) for name, tensor in self._model.dense.draw())
