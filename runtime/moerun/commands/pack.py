"""`moerun pack`: write a checkpoint's experts, and attention, as one record each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.completion import among
from moepolicy.console import emit, keeping, note
from moepolicy.options import taking
from moepolicy.tables import wrapped

from moerun.amounts import decimal_bytes
from moerun.commands import names, prepare
from moerun.commands.options import ModelOptions
from moerun.errors import RunError
from moerun.format.names import Precisions
from moerun.ranges import check_device

if TYPE_CHECKING:
    from moerun.store.expert_store import ExpertStore


def pack(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The checkpoint to pack: tiny (bundled), a folder, a GGUF file (any part of a "
            "split one), or owner/name on the Hugging Face hub.",
            autocompletion=among(names.models),
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    dense_precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of everything but experts and quantised attention: native, fp32, fp16 "
            "or bf16. Default: that of attention or experts where one of them is unquantised.",
            show_default=False,
            autocompletion=among(names.plain_precisions),
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="The device that quantises: cpu, cuda, cuda:N. Default: a GPU where there is one.",
            show_default=False,
            autocompletion=among(names.devices),
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that quantise. Default: one a core.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a finished store at --out.")
    ] = False,
    model: Annotated[ModelOptions, taking("precision", "attention")],
) -> None:
    """Pack a checkpoint into a store that moerun reads one expert at a time.

    Experts and attention are kept as they are or quantised (HQQ). After an interruption at any
    moment the same command goes on where it stopped. Stores of one checkpoint in one folder share
    equal files as hard links: another precision of attention takes no second packing of experts.
    """
    from moerun.checkpoint.local import check_there

    Precisions.chosen(model.precision, model.attention, dense_precision)
    check_there(checkpoint)
    if device is not None:
        check_device(device)
    _check_out(out, force=force)
    from moerun.checkpoint.hub import resolve
    from moerun.commands.progress import pack_progress
    from moerun.devices import find_device
    from moerun.store.find import stores_in
    from moerun.store.pack import pack as pack_store

    prepare.quiet_libraries()
    folder = resolve(checkpoint, revision=revision)
    if device is not None:
        device = str(find_device(device))
    name = folder.resolve().name if Path(checkpoint).exists() else checkpoint
    kept = f"finished experts are kept in {out}.partial: the same command goes on"
    with keeping(kept), pack_progress() as progress:
        store = pack_store(
            folder,
            out,
            precision=model.precision,
            attention=model.attention,
            dense_precision=dense_precision,
            name=name,
            revision=revision,
            workers=workers,
            device=device,
            reuse=stores_in(out.absolute().parent),
            force=force,
            report=note,
            progress=progress,
        )
    with store:
        emit(wrapped(_sizes(store)))


def _check_out(out: Path, *, force: bool) -> None:
    """RunError where no store can be made at ``out``, before libraries are imported; what `pack`
    itself finds out later is the rest."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RunError(f"--out {out}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise RunError(f"--out {out}: the folder {there} cannot be written to")
    if there != out or force or not any(out.iterdir()):
        return
    if prepare.is_packed(str(out)):  # what kind of store is there takes torch to tell
        from moerun.store.pack_folder import refuse_taken

        refuse_taken(out, force=force)
    raise RunError(
        f"--out {out} exists already and is no expert store: give a new folder, or remove it first"
    )


def _sizes(store: ExpertStore) -> Iterator[str]:
    """What was packed, part by part, and for Mixtral-8x7B what the base paper's took."""
    from moerun.perplexity.table1 import MODEL, published

    index, total = store.index, store.total_bytes
    yield (
        f"{store.path}: {index.model}, {store.n_layers} layers of {store.n_experts} experts in "
        f"{index.expert_label}, {store.record_bytes:,} bytes each; {decimal_bytes(total)} with the "
        f"dense weights ({index.dense_precision}), packed from {decimal_bytes(index.source_bytes)}"
    )
    parts = {
        f"experts, {index.expert_label}": store.n_keys * store.record_bytes,
        f"attention ({index.attention_precision})": store.attention_bytes,
        f"everything else ({index.dense_precision})": index.dense_bytes,
    }
    split = "; ".join(f"{name} {decimal_bytes(size)}" for name, size in parts.items() if size)
    yield f"{split}; {8 * total / store.n_weights:.2f} bits a weight"
    if (row := published(index)) is not None:
        yield (
            f"published for {MODEL} at these precisions (Table 1 of arXiv 2312.17238): "
            f"{row.size_gib:.2f} GiB; this store: {total / 2**30:.2f} GiB"
        )
