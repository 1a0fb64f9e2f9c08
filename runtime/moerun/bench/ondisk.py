"""Generated models as expert stores on disk, for benches whose experts are to come from files."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moerun.bench.generated import GeneratedModel, Progress, record_tensors
from moerun.errors import RunError
from moerun.format.layout import RECORD_ALIGN
from moerun.format.tensorfile import TensorFileWriter, memory_of, write_tensors
from moerun.store.expert_store import ExpertStore
from moerun.store.index import DENSE_FILE, INDEX_FILE, AttentionRecords, write_json


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
    dense_crc32 = write_tensors(partial_folder / DENSE_FILE, model.dense_tensors(), model.dense())
    model.config.save_pretrained(partial_folder)
    described = model.index.to_json()
    described["dense"]["crc32"] = dense_crc32
    if (attention := model.index.attention) is not None:
        crc32 = _write_attention(model, attention, partial_folder / attention.file)
        for linear, checksum in zip(described["attention"]["linears"], crc32, strict=True):
            linear["crc32"] = checksum
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
    tensors = record_tensors(model.record_lengths())
    with TensorFileWriter(path, tensors, align=RECORD_ALIGN) as writer:
        for expert in range(model.n_experts):
            key = layer * model.n_experts + expert
            buffer.zero_()
            model.records.write(key, buffer)
            writer.write(f"expert.{expert}", buffer)
            crc32.append(zlib.crc32(memory_of(buffer)))
            report(key + 1)
    return tuple(crc32)


def _write_attention(
    model: GeneratedModel, attention: AttentionRecords, path: Path
) -> tuple[int, ...]:
    lengths = {r.module: attention.layout(r).record_bytes for r in attention.linears}
    crc32 = []
    tensors = record_tensors(lengths)
    with TensorFileWriter(path, tensors, align=RECORD_ALIGN) as writer:
        for module, n_bytes in lengths.items():
            buffer = torch.zeros(n_bytes, dtype=torch.uint8)
            model.write_attention(module, buffer)
            writer.write(module, buffer)
            crc32.append(zlib.crc32(memory_of(buffer)))
    return tuple(crc32)


def _report(progress: Progress | None, of: int, done: int) -> None:
    if progress:
        progress(done, of)


def _same(store: ExpertStore, model: GeneratedModel) -> ExpertStore:
    ours, theirs = model.index, store.index
    for what in ("model", "precision", "attention_precision", "n_layers", "source_digest"):
        if getattr(ours, what) != getattr(theirs, what):
            raise RunError(
                f"{store.path} holds {theirs.model} in {theirs.precision}, attention in "
                f"{theirs.attention_precision}, {theirs.n_layers} layers, {theirs.source_digest}: "
                "give another --store, or remove it"
            )
    return store


def _check_space(model: GeneratedModel, folder: Path) -> None:
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = model.expert_bytes + model.weights_bytes
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RunError(
            f"the experts take {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: "
            "choose a lower precision, fewer --layers, or another --store"
        )
