"""`moerun pack`: write a checkpoint's experts, and attention, as one record each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.completion import among
from moepolicy.console import emit
from moepolicy.options import taking

from moerun.amounts import decimal_bytes
from moerun.commands import names, prepare
from moerun.commands.options import ModelOptions

if TYPE_CHECKING:
    from moerun.store.expert_store import ExpertStore


def pack(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The checkpoint to pack: tiny (bundled), a folder, or owner/name on the Hugging "
            "Face hub.",
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
    from rich.console import Console

    from moerun.checkpoint.hub import resolve
    from moerun.commands.progress import pack_progress
    from moerun.devices import find_device
    from moerun.store.find import stores_in
    from moerun.store.pack import pack as pack_store

    prepare.quiet_libraries()
    folder = resolve(checkpoint, revision=revision)
    if device is not None:
        device = str(find_device(device))
    name = folder.resolve().name if Path(checkpoint).is_dir() else checkpoint
    console = Console(stderr=True)

    def report(text: str) -> None:
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    with pack_progress(console) as progress:
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
            report=report,
            progress=progress,
        )
    with store:
        for line in _sizes(store):
            emit(f"{line}\n")


def _sizes(store: ExpertStore) -> Iterator[str]:
    """What was packed, part by part, and for Mixtral-8x7B what the base paper's took."""
    from moerun.perplexity.table1 import MODEL, published

    index, total = store.index, store.total_bytes
    yield (
        f"{store.path}: {index.model}, {store.n_layers} layers of {store.n_experts} experts in "
        f"{index.precision}, {store.record_bytes:,} bytes each; {decimal_bytes(total)} with the "
        f"dense weights ({index.dense_precision}), packed from {decimal_bytes(index.source_bytes)}"
    )
    parts = {
        f"experts ({index.precision})": store.n_keys * store.record_bytes,
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
