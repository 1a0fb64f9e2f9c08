"""Generated models as expert stores: in memory, or on disk where experts come from files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from moepolicy.outputs import drop_tree, sync_folder, sync_tree

from moerun.bench.generated import GeneratedModel, GeneratedStore
from moerun.bench.random_weights import RandomAttention, record_tensors
from moerun.errors import RunError
from moerun.format.names import RECORD_ALIGN
from moerun.format.tensorfile import TensorFileWriter, write_tensors
from moerun.store.expert_store import ExpertStore
from moerun.store.index import DENSE_FILE, INDEX_FILE, write_json
from moerun.store.pack_plan import crc32_of
from moerun.store.progress import RecordProgress


def make_store(
    model: GeneratedModel,
    folder: Path | None,
    device: torch.device,
    progress: RecordProgress | None = None,
) -> ExpertStore:
    """The model as a store in ``folder``, or in memory for a link to ``device``."""
    if folder is not None:
        return write_store(model, folder, progress)
    # A GPU's link copies all records into pinned memory of its own.
    return GeneratedStore(model, held=device.type == "cpu", progress=progress)


def write_store(
    model: GeneratedModel, folder: Path, progress: RecordProgress | None = None
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
    drop_tree(partial_folder)
    partial_folder.mkdir(parents=True)
    described = model.index.to_json()
    report = partial(_report, progress, model.index.n_layers * model.n_experts)
    for layer, layer_described in enumerate(described["layers"]):
        path = partial_folder / layer_described["file"]
        layer_described["crc32"] = _write_layer(model, path, layer, report)
    dense = model.dense
    dense_path = partial_folder / DENSE_FILE
    described["dense"]["crc32"] = write_tensors(dense_path, dense.tensors, dense.draw())
    model.config.save_pretrained(partial_folder)
    if model.attention is not None:
        path = partial_folder / described["attention"]["file"]
        crc32 = _write_attention(model.attention, path)
        for linear, checksum in zip(described["attention"]["linears"], crc32, strict=True):
            linear["crc32"] = checksum
    write_json(partial_folder / INDEX_FILE, described)
    if folder.exists():
        folder.rmdir()
    sync_tree(partial_folder)
    partial_folder.rename(folder)
    sync_folder(folder.absolute().parent)
    return ExpertStore.open(folder)


def _write_layer(
    model: GeneratedModel, path: Path, layer: int, report: Callable[[int], None]
) -> list[int]:
    """A layer's experts; their CRC-32."""

    def draw(expert: int, _name: str, buffer: torch.Tensor) -> None:
        key = layer * model.n_experts + expert
        model.records.write(key, buffer)
        report(key + 1)

    return _write_records(path, model.record_lengths(), draw)


def _write_attention(attention: RandomAttention, path: Path) -> list[int]:
    def draw(_number: int, module: str, buffer: torch.Tensor) -> None:
        attention.write(module, buffer)

    return _write_records(path, attention.record_bytes, draw)


def _write_records(
    path: Path, lengths: dict[str, int], draw: Callable[[int, str, torch.Tensor], None]
) -> list[int]:
    """A file of records of such lengths, which ``draw`` fills by number and name; their CRC-32."""
    crc32 = []
    with TensorFileWriter(path, record_tensors(lengths), align=RECORD_ALIGN) as writer:
        for number, (name, n_bytes) in enumerate(lengths.items()):
            buffer = torch.zeros(n_bytes, dtype=torch.uint8)
            draw(number, name, buffer)
            writer.write(name, buffer)
            crc32.append(crc32_of(buffer))
    return crc32


def _report(progress: RecordProgress | None, of: int, done: int) -> None:
    if progress:
        progress(done, of)


def _same(store: ExpertStore, model: GeneratedModel) -> ExpertStore:
    ours, theirs = model.index, store.index
    for what in ("model", "precision", "attention_precision", "n_layers", "source_digest"):
        if getattr(ours, what) != getattr(theirs, what):
            raise RunError(
                f"{store.path} holds {theirs.model} in {theirs.precision}, attention in "
                f"{theirs.attention_precision}, {theirs.n_layers} layers, {theirs.source_digest}: "
                "give another --store, or remove that folder"
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
