"""The command `moetrace`: record a live model's routing, import foreign traces, show statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import console
from moepolicy.outputs import check_free, check_suffix
from moepolicy.tables import Format, wrapped
from moeroute import TraceError
from moeroute.parquet import partial_folder
from moerun.errors import RunError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make routing traces: record a mixture-of-experts model, or import a foreign recording.",
)


class Prediction(StrEnum):
    """The methods of moerun.offload.gate_predictor, which the help text alone does not import."""

    own_norm = "own-norm"
    gate_input = "gate-input"


class Dtype(StrEnum):
    """What to compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


Force = Annotated[
    bool, typer.Option("--force", help="Replace a file that lies where the trace is to be written.")
]


@app.callback()
def _moetrace() -> None:
    """Record a mixture-of-experts model's routing, or import a foreign recording."""


@app.command()
def record(
    corpus: Annotated[
        list[Path],
        typer.Argument(help="Text files, folders of them, or .jsonl files (see --field)."),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
    model: Annotated[
        str, typer.Option(help="'tiny' (bundled), a checkpoint's folder, or owner/name of the hub.")
    ] = "tiny",
    revision: Annotated[str | None, typer.Option(help="Commit or branch of a hub model.")] = None,
    horizon: Annotated[
        int, typer.Option(min=0, help="Record predictions made 1 to this many layers ahead.")
    ] = 3,
    prediction: Annotated[
        Prediction | None,
        typer.Option(
            help="What later gates are applied to: the residual stream under their own norm, or "
            "the input of this layer's gate. Default: own-norm, where the family has such norms.",
            show_default=False,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence; documents are cut into such. Default: what the model was "
            "made for, 2048 at most.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many tokens of text.", show_default="all"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Mark the first so many tokens of each sequence as prompt; the rest are decode "
            "steps. With --generate: the length of the prompts.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            min=0, help="Let the model continue each prompt by so many tokens; 0: only read."
        ),
    ] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Sample generated tokens; 0, the default, takes the likeliest.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sampling; default 0.", show_default=False)
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="The field of .jsonl lines that holds the text.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Compute in this; auto: as stored, but fp16 as fp32 on the CPU."),
    ] = Dtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of whole sequences that share a forward pass.")
    ] = 2048,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted recording to --out.")
    ] = False,
    force: Force = False,
) -> None:
    """Record which experts a model chooses for each token of a corpus, and what its gates foresee.

    The text goes through the stock model as it is, each token counting as one decode step, or the
    model continues it (--generate). An interrupted recording leaves no file at --out; the same
    command with --resume goes on.
    """
    for name, value in (("--temperature", temperature), ("--seed", seed)):
        if value is not None and not generate:
            raise typer.BadParameter(f"{name} needs --generate: reading text samples nothing")
    _check_out(out, resume=resume, force=force)
    from moetrace import model as checkpoints
    from moetrace.record import Settings, open_windows
    from moetrace.record import record as write_trace

    settings = Settings(
        horizon=horizon,
        prediction=prediction.value if prediction else None,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
        generate=generate,
        temperature=temperature or 0.0,
        seed=seed or 0,
        field=field,
        batch_tokens=batch_tokens,
    )
    checkpoint = checkpoints.load(model, revision=revision, dtype=dtype.value, device=device)
    windows = open_windows(checkpoint, corpus, settings)
    total = windows.n_tokens + generate * len(windows.sequences)
    try:
        with _progress(total) as on_tokens:
            write_trace(checkpoint, windows, settings, out, resume=resume, on_tokens=on_tokens)
    except KeyboardInterrupt:
        typer.echo(f"{out} is unfinished: the same command with --resume goes on", err=True)
        raise
    _describe(out)


@app.command("import")
def import_trace(
    file: Annotated[Path, typer.Argument(help="A routing .npz or a BigMoeOnEdge route CSV.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
    force: Force = False,
    like: Annotated[
        str | None,
        typer.Option(
            help="Take the sizes that the recording lacks from this model: a name such as "
            "gpt-oss-20b, a config.json, or its folder. Layers, experts and top-k must agree with "
            "the recording's.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="The recording is of --like's first so many layers alone.", show_default=False
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Precision of --like's attention: native, bf16, 4bit, 3bit, 2bit. Default: "
            "native.",
            show_default=False,
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION=BYTES,...",
            help="Bytes of one expert by precision, that of the recording first.",
            show_default=False,
        ),
    ] = None,
    dense_layer_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Bytes of a layer's weights other than routed experts.", show_default=False
        ),
    ] = None,
    dense_token_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Bytes a token reads outside those layers: last norm, head, layers without "
            "experts.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn a foreign recording into a trace; what it did not record is left out and noted.

    Times are simulated from the model's sizes. Few recordings say them: without --like or numbers
    they stay unknown, which is said beside every number that would need them.
    """
    from moeroute.importers import import_foreign
    from moeroute.sizes import GivenSizes

    sizes = GivenSizes(
        like,
        layers,
        attention,
        _expert_bytes(expert_bytes),
        dense_layer_bytes,
        dense_token_bytes,
    )
    _check_out(out, resume=False, force=force)
    made = import_foreign(
        file, out, sizes=sizes, tell=lambda line: typer.echo(f"note: {line}", err=True)
    )
    typer.echo(made.describe(notes=False))


@app.command()
def stats(
    trace: Annotated[
        str, typer.Argument(help="A trace file, or the name of a sample: tiny, mixtral-like.")
    ] = "tiny",
    sizes: Annotated[
        str | None,
        typer.Option(help="Cache sizes for the hit ratios, in experts a layer: 2,4,6."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled copy.")] = 0,
    format: Annotated[Format, typer.Option(help="How to print the statistics.")] = Format.table,
) -> None:
    """Show a trace's locality, popularity, gate weights, recall of predictions and hit ratios.

    Beside each number that depends on the order of the tokens stands the same of a copy with the
    tokens shuffled: what is above it is locality, what is left is popularity.
    """
    from moeroute import open_trace
    from moeroute.summary import summarize

    from moetrace.report import render

    opened = open_trace(trace)
    found = summarize(opened, sizes=_numbers(sizes), seed=seed)
    console.emit(render(found, opened, format))


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--sizes {text!r}: give whole numbers, as in 2,4,6") from None


def _check_out(out: Path, *, resume: bool, force: bool) -> None:
    """CommandError where no trace can be written to ``out``, before any work is done for it.

    What there is to be resumed, or that there is nothing, is for the writer to tell.
    """
    check_suffix(out, [".parquet"])
    unfinished = partial_folder(out).is_dir()
    check_free(out, force=force or (resume and not unfinished))


def _expert_bytes(text: str | None) -> dict[str, int]:
    """The sizes of 4bit=13000000,bf16=50000000 by name."""
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if not name.strip() or not size.strip().isdecimal() or not int(size):
            raise typer.BadParameter(
                f"--expert-bytes {text!r}: give PRECISION=BYTES, as in 4bit=13000000,bf16=50000000"
            )
        found[name.strip()] = int(size)
    return found


def _describe(path: Path) -> None:
    from moeroute import open_trace

    console.emit(wrapped(open_trace(path).describe().splitlines()))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, bool], None]]:
    """A bar with tokens/s on stderr; yields what to tell newly done tokens to."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    stderr = Console(stderr=True)
    columns = (
        TextColumn("recording"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens, {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    done, started = 0, time.perf_counter()
    hidden = not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, speed="?")

        def advance(tokens: int, earlier: bool) -> None:
            nonlocal done, started
            if earlier:  # says nothing about the speed of this run
                started = time.perf_counter()
            else:
                done += tokens
            elapsed_s = max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=tokens, speed=f"{done / elapsed_s:,.0f}")

        yield advance
    elapsed_s = time.perf_counter() - started
    stderr.print(f"{done:,} tokens in {elapsed_s:.1f} s, {done / elapsed_s:,.0f} tokens/s")


def main() -> None:
    """Entry point of the console script."""
    console.run(app, errors=(RunError, TraceError))
