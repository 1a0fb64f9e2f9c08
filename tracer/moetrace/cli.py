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
from moepolicy.apps import Force, add_command, make_app
from moepolicy.completion import among
from moepolicy.options import formerly
from moepolicy.outputs import check_free, check_suffix
from moepolicy.tables import Format, wrapped
from moeroute import TraceError
from moeroute.options import TRACE_HELP, SizeOptions, complete_traces
from moeroute.parquet import partial_folder
from moerun.commands import names
from moerun.errors import RunError

from moetrace import __version__

HELP = "Make routing traces: record a mixture-of-experts model, or import a foreign recording."
PACKAGES = (
    *("torch", "transformers", "safetensors", "hqq", "accelerate"),
    *("numpy", "polars", "rich", "typer"),
)


class Prediction(StrEnum):
    """The methods of moerun.offload.gate_predictor, which the help text alone does not import."""

    own_norm = "own-norm"
    gate_input = "gate-input"


class Precision(StrEnum):
    """What to compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def record(
    corpus: Annotated[
        list[Path],
        typer.Argument(
            metavar="CORPUS",
            help="Text files, folders of them, or .jsonl files (see --field).",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
    model: Annotated[
        str,
        typer.Option(
            help="The model: tiny (bundled), a checkpoint's folder, or owner/name on the Hugging "
            "Face hub.",
            autocompletion=among(names.models),
        ),
    ] = "tiny",
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False),
    ] = None,
    horizon: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many layers ahead gates are applied: predictions made 1 to this many "
            "layers early are recorded.",
        ),
    ] = 3,
    prediction: Annotated[
        Prediction | None,
        typer.Option(
            help="What later gates are applied to. own-norm: the residual stream under their own "
            "norm. gate-input: the input of this layer's gate. Default: own-norm where the "
            "family has such norms.",
            show_default=False,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence; longer documents are cut. Default: the model's context, "
            "2048 at most.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after this many tokens of text. Default: all.", show_default=False
        ),
        formerly("--max-tokens"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Mark this many first tokens of each sequence as prompt; the others are decode "
            "steps. With --generate: the length of the prompts.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the model continue each prompt by this many tokens. 0: only read.",
        ),
    ] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0 takes the likeliest token; values above 0 sample. Default: 0.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the sampling. Default: 0.", show_default=False),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="The field of .jsonl lines that holds the text.", show_default=False),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            help="What the model computes in. auto: as stored, but fp16 as fp32 on the CPU."
        ),
        formerly("--dtype"),
    ] = Precision.auto,
    device: Annotated[
        str,
        typer.Option(
            help="The device that computes: cpu, cuda, cuda:N, or auto (a GPU where there is one).",
            autocompletion=among(names.devices),
        ),
    ] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of whole sequences that share a forward pass.")
    ] = 2048,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted recording to --out.")
    ] = False,
    force: Force = False,
) -> None:
    """Record which experts a model chooses for each token of a corpus.

    The trace has the predictions of later gates, too. The stock model reads the text as it is,
    each token counting as one decode step, or continues it (--generate). An interrupted recording
    leaves no file at --out; the same command with --resume goes on.
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
        max_tokens=tokens,
        prompt_tokens=prompt_tokens,
        generate=generate,
        temperature=temperature or 0.0,
        seed=seed or 0,
        field=field,
        batch_tokens=batch_tokens,
    )
    checkpoint = checkpoints.load(model, revision=revision, dtype=precision.value, device=device)
    windows = open_windows(checkpoint, corpus, settings)
    total = windows.n_tokens + generate * len(windows.sequences)
    try:
        with _progress(total) as on_tokens:
            write_trace(checkpoint, windows, settings, out, resume=resume, on_tokens=on_tokens)
    except KeyboardInterrupt:
        typer.echo(f"{out} is unfinished: the same command with --resume goes on", err=True)
        raise
    _describe(out)


def import_trace(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The recording: a routing .npz or a BigMoeOnEdge route CSV."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
    force: Force = False,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION=BYTES,...",
            help="Bytes of one expert by precision, that of the recording first.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
        ),
    ] = None,
    sizes: SizeOptions,
) -> None:
    """Turn a foreign recording into a trace.

    What the recording lacks is left out and noted. Times are simulated from the model's sizes.
    Few recordings have the sizes: without --like or numbers they stay unknown, and every number
    that needs them says so.
    """
    from moeroute.importers import import_foreign

    known = _expert_bytes(expert_bytes)
    _check_out(out, resume=False, force=force)
    made = import_foreign(
        file,
        out,
        sizes=sizes.given(known),
        tell=lambda line: typer.echo(f"note: {line}", err=True),
    )
    typer.echo(made.describe(notes=False))


def stats(
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help=TRACE_HELP, autocompletion=complete_traces)
    ] = "tiny",
    *,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Cache sizes for the hit ratios, in experts per layer: 2,4,6. Default: at most "
            "ten, from top-k to all experts but one.",
            show_default=False,
        ),
        formerly("--sizes"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled copy of the trace.")] = 0,
    format: Annotated[Format, typer.Option(help="How to print the statistics.")] = Format.table,
) -> None:
    """Show a trace's locality, popularity, gate weights, recall of predictions and hit ratios.

    Next to each number that depends on the order of the tokens stands the number of a copy with
    the tokens shuffled: the difference comes from locality, the rest from popularity.
    """
    from moeroute import open_trace
    from moeroute.summary import summarize

    from moetrace.report import render

    opened = open_trace(trace)
    found = summarize(opened, sizes=_numbers(slots), seed=seed)
    console.emit(render(found, opened, format))


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--slots {text!r}: give whole numbers, as in 2,4,6") from None


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


app = make_app("moetrace", HELP, version=__version__, packages=PACKAGES)
add_command(app, record)
add_command(app, import_trace, "import")
add_command(app, stats)


def main() -> None:
    """Entry point of the console script."""
    console.run(app, errors=(RunError, TraceError))
