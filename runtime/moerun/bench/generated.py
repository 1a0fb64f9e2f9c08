"""Expert stores of random weights: records of the true layout and size, without a checkpoint.

Codes, scales and zeros are drawn in the packed form itself, so that nothing is quantised. One
record is drawn; every other is that one with each part turned by its own offset, which costs no
more than copying it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moeroute.models import dense_sizes

from moerun.checkpoint.families import (
    count_experts,
    empty_model,
    expert_shape,
    find_attention,
    find_experts,
    shared_experts_of,
    top_k_of,
    vocabulary_of,
)
from moerun.errors import RunError
from moerun.format.bitplanes import SCALE_UNIT
from moerun.format.expert import ExpertShape
from moerun.format.layout import RECORD_ALIGN
from moerun.format.precision import NATIVE, PLAIN, SCHEMES, Precisions, Scheme, scheme_of
from moerun.format.tensorfile import bytes_of, header_of
from moerun.offload.attention import install_attention
from moerun.offload.experts import IMPLEMENTATION, register
from moerun.offload.load import rebuild_buffers
from moerun.store.expert_store import ExpertStore, Read
from moerun.store.index import (
    ATTENTION_FILE,
    AttentionRecords,
    LayerRecords,
    LinearRecord,
    StoreIndex,
    experts_file,
)
from moerun.versions import store_packages

WEIGHT_STD = 0.02
_DRAWN = 1 << 20  # dense weights repeat a block of so many
_ZERO_SPREAD = 0.4  # of a group's zero, in codes

Progress = Callable[[int, int], None]


class RandomRecords:
    """Records of one layout by key; the same seed gives the same. Safe to share."""

    def __init__(self, shape: ExpertShape, precision: str, seed: int) -> None:
        self.layout = shape.record(precision)
        self.record_bytes = self.layout.record_bytes
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.zeros(self.record_bytes, dtype=torch.uint8)
        scheme = scheme_of(precision)
        for name, part in self.layout.views(drawn).items():
            _draw(name, part, scheme, generator)
        self._parts = self.layout.views(drawn)

    def write(self, key: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8[record_bytes]."""
        for name, to in self.layout.views(buffer).items():
            source = self._parts[name].view(-1)
            turn = key * 104729 % len(source)
            flat = to.view(-1)
            flat[: len(source) - turn] = source[turn:]
            flat[len(source) - turn :] = source[:turn]


def _draw(name: str, part: torch.Tensor, scheme: Scheme | None, generator: torch.Generator) -> None:
    if part.is_floating_point() and name.rpartition(".")[2] == "ranges":
        assert scheme is not None
        part.copy_(_ranges(scheme)[:, None].expand_as(part))
    elif part.is_floating_point():
        part.view(-1).copy_(_normals(part.numel(), part.dtype, generator))
    else:
        part.random_(0, 256, generator=generator)


def _ranges(scheme: Scheme) -> torch.Tensor:
    """Step and least value of scales and zeros that give weights of WEIGHT_STD around 0."""
    levels = 1 << scheme.bits
    scale = WEIGHT_STD / math.sqrt((levels * levels - 1) / 12) * SCALE_UNIT
    least_zero = (levels - 1 - _ZERO_SPREAD) / 2
    return torch.tensor([scale / 2 / 255, 0.75 * scale, _ZERO_SPREAD / 255, least_zero])


def _normals(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """WEIGHT_STD normals, a drawn block over and over."""
    block = (torch.randn(min(n, _DRAWN), generator=generator) * WEIGHT_STD).to(dtype)
    return block.repeat(-(-n // len(block)))[:n]


class GeneratedModel:
    """A model of a configuration whose weights are drawn as they are asked for."""

    def __init__(
        self, config: Any, *, name: str, precision: str, seed: int, attention: str = NATIVE
    ) -> None:
        """``precision`` is the experts'; both precisions are chosen from as for a pack.

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
        self.shape = expert_shape(found[0][1], native)
        self.records = RandomRecords(self.shape, precision, seed)
        for _, module in found:
            for parameter, _ in list(module.named_parameters(recurse=False)):
                setattr(module, parameter, None)
        self._projections: dict[str, RandomRecords] = {}
        if self.precisions.packs_attention:
            self._projections = self._draw_attention()
        self._dense = self._dense_tensors()
        self.index = self._index(precision)

    def at(self, precision: str) -> GeneratedModel:
        """The same model with its experts at another precision."""
        other = copy.copy(self)
        other.precisions = replace(self.precisions, expert=precision)
        other.records = RandomRecords(self.shape, precision, self.seed)
        other.index = other._index(precision)
        return other

    def dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every weight that is neither an expert's nor packed attention's."""
        return dict(self._dense)

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those weights, on the CPU: norms 1, the others normal."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        for name, (dtype, shape) in self._dense.items():
            if len(shape) == 1 and name.endswith("weight"):
                yield name, torch.ones(shape, dtype=dtype)
            else:
                yield name, _normals(math.prod(shape), dtype, generator).view(shape)

    def write_attention(self, module: str, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8, with the record of a packed projection, by its module's name."""
        self._projections[module].write(list(self._projections).index(module), buffer)

    def build(self, store: ExpertStore, device: torch.device) -> Any:
        """The model, ready to run but for its experts: dense weights and packed attention are
        read from ``store``. Once."""
        model = self._model
        install_attention(model, store, device)
        state = dict(store.read_dense(device))
        model.load_state_dict(state, strict=False, assign=True)
        model.requires_grad_(False)
        model.tie_weights()
        for module in model.modules():  # biases of the ranking and the like
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta and name in module.state_dict():
                    module._buffers[name] = torch.zeros_like(buffer, device=device)
        rebuild_buffers(model, device)
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_model_config(self.config)
        return model

    def record_lengths(self) -> dict[str, int]:
        """Of a layer's records, by their names in its file."""
        return {f"expert.{e}": self.records.record_bytes for e in range(self.n_experts)}

    def _draw_attention(self) -> dict[str, RandomRecords]:
        """By module; projections of one shape share what is drawn."""
        precision = self.precisions.attention
        drawn: dict[tuple[int, int], RandomRecords] = {}
        found = {}
        for name, linear in find_attention(self._model):
            rows, columns = linear.weight.shape
            SCHEMES[precision].check(name, columns)
            if (rows, columns) not in drawn:
                shape = ExpertShape.matrix(rows, columns)
                drawn[rows, columns] = RandomRecords(shape, precision, self.seed)
            found[name] = drawn[rows, columns]
        return found

    def _dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        packed = {f"{module}.weight" for module in self._projections}
        return {
            name: (parameter.dtype, tuple(parameter.shape))
            for name, parameter in self._model.named_parameters()
            if name not in packed
        }

    def _index(self, precision: str) -> StoreIndex:
        dense = {name: bytes_of(dtype, shape) for name, (dtype, shape) in self._dense.items()}
        packed = {name: records.record_bytes for name, records in self._projections.items()}
        file_bytes, offsets = _laid_out(self.record_lengths())
        sizes = dense_sizes(dense | packed, self._modules, vocabulary_of(self.config))
        return StoreIndex(
            model=self.name,
            revision=None,
            model_type=self.config.model_type,
            top_k=top_k_of(self.config),
            n_shared_experts=shared_experts_of(self.config),
            precision=precision,
            dense_precision=self.precisions.dense,
            dense_bytes=sum(dense.values()),
            dense_skew={},
            layer_bytes=sizes.layer_bytes,
            token_bytes=sizes.token_bytes,
            shape=self.shape,
            layout=self.records.layout,
            layers=tuple(
                LayerRecords(
                    module, experts_file(i), file_bytes, tuple(offsets), (0,) * self.n_experts
                )
                for i, module in enumerate(self._modules)
            ),
            source_digest=f"random weights, seed {self.seed}",
            source_bytes=0,
            packages=store_packages(),
            attention=self._attention_records() if packed else None,
        )

    def _attention_records(self) -> AttentionRecords:
        lengths = {name: records.record_bytes for name, records in self._projections.items()}
        file_bytes, offsets = _laid_out(lengths)
        linears = tuple(
            LinearRecord(name, linear.out_features, linear.in_features, offset, crc32=0)
            for (name, linear), offset in zip(find_attention(self._model), offsets, strict=True)
        )
        return AttentionRecords(self.precisions.attention, ATTENTION_FILE, file_bytes, linears)

    @property
    def expert_bytes(self) -> int:
        """Of all experts together."""
        return self.index.n_layers * self.n_experts * self.records.record_bytes

    @property
    def weights_bytes(self) -> int:
        """Of everything else, as it is stored."""
        attention = self.index.attention
        return self.index.dense_bytes + (attention.file_bytes if attention else 0)


def record_tensors(lengths: dict[str, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Records by name, as safetensors is told of them: their bytes."""
    return {name: (torch.uint8, (n_bytes,)) for name, n_bytes in lengths.items()}


def _laid_out(lengths: dict[str, int]) -> tuple[int, list[int]]:
    """Bytes of a file of such records, and where each lies."""
    header, entries = header_of(record_tensors(lengths), align=RECORD_ALIGN)
    file_bytes = len(header) + sum(entry.nbytes for entry in entries.values())
    return file_bytes, [entry.offset for entry in entries.values()]


class GeneratedStore(ExpertStore):
    """A store that is nowhere on a disk: its records are drawn, or held in memory."""

    def __init__(self, model: GeneratedModel, *, held: bool, progress: Progress | None = None):
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
        verify: bool | None = None,
        read: Read | None = None,
        pieces: Callable[[int], Iterator[slice]] | None = None,
    ) -> None:
        """As a store does, from no file: there is nothing to verify or to ``read`` otherwise."""
        if self._memory is None:
            self._records.write(key, buffer)
            return
        for piece in pieces(self.record_bytes) if pieces else (slice(None),):
            buffer[piece].copy_(self._memory[key][piece])

    def read_attention(self, module: str, buffer: torch.Tensor) -> None:
        self._model.write_attention(module, buffer)

    def config(self) -> Any:
        return self._model.config

    def dense_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self._model.dense_tensors()

    def read_dense(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(device)) for name, tensor in self._model.dense())
