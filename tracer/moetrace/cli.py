"""The command `moetrace`: record a live model's routing, import foreign traces, show statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import console
from moepolicy.apps import Force, OutputOptions, add_command, make_app
from moepolicy.lists import numbers
from moepolicy.options import formerly
from moepolicy.progress import Bar
from moepolicy.tables import wrapped
from moeroute.options import TRACE_HELP, complete_traces
from moerun.errors import RunError
from moerun.ranges import check_device

from moetrace import __version__
from moetrace.corpus import check_corpus
from moetrace.export_command import export
from moetrace.import_command import import_trace
from moetrace.options import ComputeOptions, SourceOptions, TextOptions
from moetrace.outputs import check_out, unfinished

HELP = "Make routing traces: record a mixture-of-experts model, or import a foreign recording."
PACKAGES = (
    *("torch", "transformers", "safetensors", "hqq", "accelerate"),
    *("numpy", "polars", "rich", "typer"),
)


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
    source: SourceOptions,
    text: TextOptions,
    compute: ComputeOptions,
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
    from moerun.checkpoint.local import check_there

    text.check()
    check_out(out, resume=resume, force=force)
    check_corpus(corpus, text.field)
    check_device(compute.device)
    check_there(source.model)
    with Bar("loading PyTorch and the model"):
        from moetrace import model as checkpoints
        from moetrace.record import open_windows
        from moetrace.record import record as write_trace

        settings = text.settings(compute.batch_tokens)
        checkpoint = checkpoints.load(
            source.model,
            revision=source.revision,
            dtype=compute.precision.value,
            device=compute.device,
        )
    with Bar("reading the corpus"):
        windows = open_windows(checkpoint, corpus, settings)
    total = windows.n_tokens + settings.generate * len(windows.sequences)
    with console.keeping(lambda: unfinished(out)), _progress(total) as on_tokens:
        write_trace(checkpoint, windows, settings, out, resume=resume, on_tokens=on_tokens)
    _describe(out)


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
    output: OutputOptions,
) -> None:
    """Show a trace's locality, popularity, gate weights, recall of predictions and hit ratios.

    Next to each number that depends on the order of the tokens stands the number of a copy with
    the tokens shuffled: the difference comes from locality, the rest from popularity.
    """
    destination = output.checked()
    from moeroute import open_trace
    from moeroute.summary import summarize

    from moetrace.report import deliver

    opened = open_trace(trace)
    sizes, least, most = numbers(slots, "--slots"), opened.meta.top_k, opened.meta.n_experts
    if beyond := [size for size in sizes or () if not least <= size <= most]:
        raise typer.BadParameter(
            f"--slots {beyond[0]}: a cache of {trace} has {least} experts a layer, which a token "
            f"uses, to {most}, which are all"
        )
    found = summarize(opened, sizes=sizes, seed=seed)
    deliver(destination, found, opened)


def _describe(path: Path) -> None:
    from moeroute import open_trace

    console.emit(wrapped(open_trace(path).describe().splitlines()))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, bool], None]]:
    """A bar with tokens/s on stderr; yields what to tell newly done tokens to."""
    done, before, started = 0, 0, time.perf_counter()
    with Bar("recording", total, "token") as bar:

        def advance(tokens: int, earlier: bool) -> None:
            nonlocal done, before, started
            if earlier:  # says nothing about the speed of this run
                before, started = tokens, time.perf_counter()
                bar.go_on_from(before)
            else:
                done += tokens
                bar.update(before + done)

        yield advance
    elapsed_s = max(time.perf_counter() - started, 1e-9)
    console.say(f"{done:,} tokens in {elapsed_s:.1f} s, {done / elapsed_s:,.0f} tokens/s")


app = make_app("moetrace", HELP, version=__version__, packages=PACKAGES)
add_command(app, record)
add_command(app, import_trace, "import")
add_command(app, export)
add_command(app, stats)


def _errors() -> tuple[type[Exception], ...]:
    from moepolicy import PolicyError
    from moeroute import TraceError

    return RunError, PolicyError, TraceError


def main() -> None:
    """Entry point of the console script."""
    console.run(app, errors=_errors)
