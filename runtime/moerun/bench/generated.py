"""Expert stores of random weights: records of the true layout and size, without a checkpoint.

Codes, scales and zeros are drawn in the packed form itself, so that nothing is quantised. One
record is drawn; every other is that one with each part turned by its own offset, which costs no
more than copying it.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moerun.errors import RunError
from moerun.experts import IMPLEMENTATION, register
from moerun.families import (
    count_experts,
    empty_model,
    expert_shape,
    find_experts,
    shared_experts_of,
    top_k_of,
)
from moerun.index import DENSE_FILE, INDEX_FILE, LayerRecords, StoreIndex, experts_file, write_json
from moerun.layout import RECORD_ALIGN, RecordLayout
from moerun.model import rebuild_buffers
from moerun.packing import SCALE_UNIT, Scheme
from moerun.plan import layer_bytes, packages, token_bytes
from moerun.shape import ExpertShape, scheme_of
from moerun.store import ExpertStore, Read
from moerun.tensorfile import TensorFileWriter, bytes_of, header_of, memory_of

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

    def __init__(self, config: Any, *, name: str, precision: str, seed: int) -> None:
        """Raises RunError where the precision does not fit the configuration's matrices."""
        register()
        self.config = config
        self.seed = seed
        self.dtype = config.dtype or torch.bfloat16
        self._model: Any = empty_model(config, self.dtype, experts=IMPLEMENTATION)
        found = find_experts(self._model)
        if not found:
            raise RunError(f"{name} has no layers with experts: keep more of its layers")
        self._modules = [module for module, _ in found]
        self.n_experts = count_experts(found[0][1])
        self.shape = expert_shape(found[0][1], self.dtype)
        self.records = RandomRecords(self.shape, precision, seed)
        for _, module in found:
            for parameter, _ in list(module.named_parameters(recurse=False)):
                setattr(module, parameter, None)
        self.index = self._index(name, precision)

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight that is no routed expert's, on the CPU: norms 1, the others normal."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        for name, parameter in self._model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                yield name, torch.ones(parameter.shape, dtype=parameter.dtype)
            else:
                drawn = _normals(parameter.numel(), parameter.dtype, generator)
                yield name, drawn.view(parameter.shape)

    def build(self, device: torch.device) -> Any:
        """The model, ready to run but for its experts. Once."""
        model = self._model
        state = {name: tensor.to(device) for name, tensor in self.dense()}
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

    def _index(self, name: str, precision: str) -> StoreIndex:
        dense = {
            tensor: bytes_of(parameter.dtype, parameter.shape)
            for tensor, parameter in self._model.named_parameters()
        }
        header, entries = header_of(
            _record_tensors(self.records.layout, self.n_experts), align=4096
        )
        offsets = tuple(entry.offset for entry in entries.values())
        file_bytes = len(header) + sum(entry.nbytes for entry in entries.values())
        return StoreIndex(
            model=name,
            revision=None,
            model_type=self.config.model_type,
            top_k=top_k_of(self.config),
            n_shared_experts=shared_experts_of(self.config),
            precision=precision,
            dense_precision="native",
            dense_bytes=sum(dense.values()),
            dense_skew={},
            layer_bytes=layer_bytes(dense, tuple(self._modules)),
            token_bytes=token_bytes(dense, self.config),
            shape=self.shape,
            layout=self.records.layout,
            layers=tuple(
                LayerRecords(module, experts_file(i), file_bytes, offsets, (0,) * self.n_experts)
                for i, module in enumerate(self._modules)
            ),
            source_digest=f"random weights, seed {self.seed}",
            source_bytes=0,
            packages=packages(),
        )

    @property
    def expert_bytes(self) -> int:
        """Of all experts together."""
        return self.index.n_layers * self.n_experts * self.records.record_bytes


def _record_tensors(
    layout: RecordLayout, n_experts: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {f"expert.{e}": (torch.uint8, (layout.record_bytes,)) for e in range(n_experts)}


class GeneratedStore(ExpertStore):
    """A store that is nowhere on a disk: its records are drawn, or held in memory."""

    def __init__(self, model: GeneratedModel, *, held: bool, progress: Progress | None = None):
        """``held``: draw every record now; else each time it is read, which is for a link that
        copies them all into memory of its own. Raises RunError where memory does not suffice."""
        super().__init__(Path(f"<random {model.index.model}>"), model.index)
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


def write_store(
    model: GeneratedModel, folder: Path, progress: Progress | None = None
) -> ExpertStore:
    """The model as a store on disk, the one that is there if it is of the same model and seed.

    Raises RunError where the folder holds something else or the disk is too small.
    """
    if (folder / INDEX_FILE).is_file():
        return _same(ExpertStore.open(folder), model)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} exists already and is no store: give a new folder")
    _check_space(model, folder)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    layers = []
    report = partial(_report, progress, model.index.n_layers * model.n_experts)
    for layer, records in enumerate(model.index.layers):
        crc32 = _write_layer(model, partial_folder / records.file, layer, report)
        layers.append(crc32)
    dense = {name: (t.dtype, tuple(t.shape)) for name, t in model.dense()}
    with TensorFileWriter(partial_folder / DENSE_FILE, dense) as writer:
        for name, tensor in model.dense():
            writer.write(name, tensor)
    model.config.save_pretrained(partial_folder)
    described = model.index.to_json()
    for described_layer, crc32 in zip(described["layers"], layers, strict=True):
        described_layer["crc32"] = list(crc32)
    write_json(partial_folder / INDEX_FILE, described)
    if folder.exists():
        folder.rmdir()
    partial_folder.rename(folder)
    return ExpertStore.open(folder)


def _write_layer(
    model: GeneratedModel, path: Path, layer: int, report: Callable[[int], None]
) -> tuple[int, ...]:
    crc32 = []
    buffer = torch.empty(model.records.record_bytes, dtype=torch.uint8)
    tensors = _record_tensors(model.records.layout, model.n_experts)
    with TensorFileWriter(path, tensors, align=RECORD_ALIGN) as writer:
        for expert in range(model.n_experts):
            key = layer * model.n_experts + expert
            buffer.zero_()
            model.records.write(key, buffer)
            writer.write(f"expert.{expert}", buffer)
            crc32.append(zlib.crc32(memory_of(buffer)))
            report(key + 1)
    return tuple(crc32)


def _report(progress: Progress | None, of: int, done: int) -> None:
    if progress:
        progress(done, of)


def _same(store: ExpertStore, model: GeneratedModel) -> ExpertStore:
    ours, theirs = model.index, store.index
    for what in ("model", "precision", "n_layers", "source_digest"):
        if getattr(ours, what) != getattr(theirs, what):
            raise RunError(
                f"{store.path} holds {theirs.model} in {theirs.precision}, {theirs.n_layers} "
                f"layers, {theirs.source_digest}: give another --store, or remove it"
            )
    return store


def _check_space(model: GeneratedModel, folder: Path) -> None:
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = model.expert_bytes + model.index.dense_bytes
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RunError(
            f"the experts take {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: "
            "choose a lower precision, fewer --layers, or another --store"
        )
