"""`moerun pack`: write a checkpoint's experts as one record each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerun.commands import options as opt


def pack(
    model: Annotated[
        str,
        typer.Argument(
            help="tiny (bundled), a checkpoint's folder, or owner/name on the Hugging Face hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    precision: opt.Precision = "native",
    dense_precision: Annotated[
        str | None,
        typer.Option(
            help="Of everything but the experts: native, fp32, fp16 or bf16. Default: that of the "
            "experts unless they are quantised.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="What quantises: cpu, cuda, cuda:N. Default: a GPU where there is one.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that quantise. Default: one a core.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Of a model on the hub: branch, tag or commit.", show_default=False),
    ] = None,
) -> None:
    """Pack a checkpoint into a store that moerun reads one expert at a time.

    Experts are kept as they are or quantised (HQQ). Interrupted at any moment, the same command
    goes on where it stopped.
    """
    from rich.console import Console

    from moerun.checkpoints import resolve
    from moerun.commands.progress import pack_progress
    from moerun.devices import find_device
    from moerun.pack import pack as pack_store

    opt.quiet_libraries()
    checkpoint = resolve(model, revision=revision)
    if device is not None:
        device = str(find_device(device))
    name = checkpoint.resolve().name if Path(model).is_dir() else model
    with pack_progress(Console(stderr=True)) as progress:
        store = pack_store(
            checkpoint,
            out,
            precision=precision,
            dense_precision=dense_precision,
            name=name,
            revision=revision,
            workers=workers,
            device=device,
            progress=progress,
        )
    index = store.index
    typer.echo(
        f"{out}: {index.model}, {store.n_layers} layers of {store.n_experts} experts in "
        f"{index.precision}, {store.record_bytes:,} bytes each; "
        f"{store.total_bytes / 1e9:.3f} GB with the dense weights ({index.dense_precision}), "
        f"packed from {index.source_bytes / 1e9:.3f} GB"
    )
    store.close()
