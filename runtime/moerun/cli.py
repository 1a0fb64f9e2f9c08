"""The command `moerun`: generate text with a mixture-of-experts model that does not fit memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import PolicyError, console, find_policy, policy_names
from moepolicy.outputs import check_free, check_suffix
from moepolicy.tables import Format, described

from moerun.commands import options as opt
from moerun.commands.bench import bench
from moerun.commands.chat import chat
from moerun.commands.fidelity import fidelity
from moerun.commands.pack import pack
from moerun.commands.perplexity import perplexity
from moerun.commands.profile import profile
from moerun.commands.serve import serve
from moerun.errors import RunError
from moerun.policies import unserved

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue. Default: what stdin gives.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file.")
    ] = None,
    model: opt.Model = "tiny",
    policy: opt.Policy = "lru",
    slots: opt.Slots = None,
    memory: opt.Memory = None,
    memory_file: opt.MemoryFile = None,
    context_tokens: opt.ContextTokens = None,
    host_memory: opt.HostMemory = None,
    scope: opt.Scope = "layer",
    precision: opt.Precision = "native",
    attention: opt.Attention = "native",
    store: opt.Store = None,
    low: opt.Low = None,
    device: opt.Device = "auto",
    streams: opt.Streams = 1,
    chunk: opt.Chunk = None,
    link_gbps: opt.LinkGbps = None,
    cold: opt.Cold = False,
    threads: opt.Threads = None,
    horizon: opt.Horizon = None,
    calibration: opt.Calibration = None,
    max_new_tokens: opt.MaxNewTokens = 100,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    stop: opt.Stop = None,
    seed: opt.Seed = 0,
    record: Annotated[
        Path | None, typer.Option(help="Write the trace of this run to a Parquet file.")
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Write every transfer and decision to a JSON file: with the trace of --record "
            "they repeat the run exactly."
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what would take how much memory, and load nothing."),
    ] = False,
    force: opt.Force = False,
    format: Annotated[
        Format,
        typer.Option(
            help="table: stream the text to stdout, statistics to stderr. json, csv: everything "
            "on stdout at the end."
        ),
    ] = Format.table,
) -> None:
    """Run mixture-of-experts models with most of their experts on disk or in host memory.

    Without a command: continue a prompt. The text streams to stdout; tokens/s, hits, loads, stall
    and memory follow on stderr.

    Try: moerun --policy lru-spec --slots 3 --prompt "Once upon a time"
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context, context.invoked_subcommand)
        return
    from moerun.commands.run import run, show_plan

    for path, suffix, what in ((record, ".parquet", "--record"), (journal, ".json", "--journal")):
        if path is not None:
            check_suffix(path, [suffix], what)
            check_free(path, force=force, what=what)
    unprompted = plan and prompt is None and prompt_file is None
    text = None if unprompted else _prompt(prompt, prompt_file)
    settings = opt.settings(
        policy=policy,
        slots=slots,
        memory=memory,
        memory_file=memory_file,
        context=context_tokens,
        host_memory=host_memory,
        chunk=chunk,
        scope=scope,
        device=device,
        streams=streams,
        link_gbps=link_gbps,
        cold=cold,
        threads=threads,
        horizon=horizon,
        calibration=calibration,
        recording=record is not None,
    )
    sampling = opt.sampling(max_new_tokens, temperature, top_p, seed, stop)
    found = opt.store(model, precision, store, attention)
    settings = replace(settings, low=opt.low_store(model, low, found))
    if text is None or plan:
        show_plan(found, settings, sampling, text, format)
        return
    if run(found, settings, sampling, text, trace=record, journal=journal, format=format):
        raise typer.Exit(console.INTERRUPTED)


def _refuse_misplaced(context: typer.Context, command: str) -> None:
    """An option in front of a command would do nothing."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(
                f"{option} stands before '{command}', which does not see it: put it behind"
            )


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        return _decoded(prompt_file.read_bytes(), str(prompt_file))
    if sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, --prompt-file FILE, or a prompt on stdin")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RunError(f"the prompt on stdin is no {sys.stdin.encoding} text") from error
    return _decoded(text.encode("utf-8", "surrogateescape"), "the prompt on stdin")


def _decoded(prompt: bytes, where: str) -> str:
    try:
        return prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{where} is no UTF-8 text") from error


app.command()(chat)
app.command()(serve)
app.command()(pack)
app.command()(profile)
app.command()(fidelity)
app.command()(bench)
app.command()(perplexity)


@app.command("policies")
def list_policies() -> None:
    """List the policies there are, and which of them only the simulator can run."""
    shown = {}
    for name, summary in policy_names().items():
        what = unserved(find_policy(name))
        shown[name] = summary + (f" [not live: needs {what}]" if what else "")
    console.emit(described(shown))


def main() -> None:
    # A trace may be written or read: its errors are the user's to mend, too.
    from moeroute import TraceError

    console.run(app, errors=(RunError, PolicyError, TraceError))
