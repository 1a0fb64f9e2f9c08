"""`moerun generate`: one prompt, continued under a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from moepolicy.apps import Force
from moepolicy.tables import Format

from moerun.commands import prepare
from moerun.commands.options import (
    CacheOptions,
    DeviceOptions,
    ModelOptions,
    OnPolicyError,
    SamplingOptions,
)
from moerun.errors import RunError


def generate(
    context: typer.Context,
    *,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to continue. Default: the text on stdin.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Read the prompt from this file.", show_default=False),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the trace of this run to a Parquet file.", show_default=False),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Write every transfer and decision to a JSON file. With the trace of --record "
            "the journal repeats the run exactly.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what would take how much memory, and load nothing: --model may be a "
            "shape's name, too (see 'moerun families'), and of a model on the hub config.json "
            "alone is fetched. --device cuda plans for a GPU that is not here, too.",
        ),
    ] = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Show tokens/s, hits, loads and stall while the text is generated: at the "
            "bottom of the terminal, or a line every 5 s where stderr is none.",
        ),
    ] = False,
    force: Force = False,
    format: Annotated[
        Format,
        typer.Option(
            help="table: stream the text to stdout and print statistics on stderr. json, csv: "
            "print everything on stdout at the end. There is no --out, as the text streams: send "
            "stdout to a file."
        ),
    ] = Format.table,
    on_policy_error: OnPolicyError = "fallback",
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
    sampling: SamplingOptions,
) -> None:
    """Continue a prompt.

    The text streams to stdout. Tokens/s, hits, loads, stall and memory follow on stderr.

    Try: moerun generate --policy lru-spec --slots 3 --prompt "Once upon a time"
    """
    _refuse_words(context)
    prepare.check(
        model=model,
        planned=plan,
        cache=cache,
        device=device,
        sampling=sampling,
        on_policy_error=on_policy_error,
    )
    prepare.check_recording(record, journal, force=force)
    if stats and plan:
        raise typer.BadParameter("--stats is of a run, and --plan makes none")
    unprompted = plan and prompt is None and prompt_file is None
    text = None if unprompted else _prompt(prompt, prompt_file)
    if text == "":
        raise RunError("the prompt is empty")
    settings = prepare.settings(
        cache,
        device,
        on_policy_error=on_policy_error,
        recording=record is not None,
        planned=plan,
    )
    chosen = prepare.sampling(sampling)
    if plan and not prepare.is_packed(model.model):
        prepare.quiet_libraries()
        from moerun.commands.plan import show_shape_plan

        show_shape_plan(model, settings, chosen, text, format)
        return
    found, settings = prepare.opened(model, settings)
    from moerun.commands.run import run, show_plan

    if text is None or plan:
        show_plan(found, settings, chosen, text, format)
        return
    code = run(
        found,
        settings,
        chosen,
        text,
        trace=record,
        journal=journal,
        format=format,
        stats=stats,
    )
    if code:
        raise typer.Exit(code)


def _refuse_words(context: typer.Context) -> None:
    """Wrong usage where words follow the options: a command whose options stand before it, say."""
    if not context.args:
        return
    word = context.args[0]
    commands = getattr(context.parent.command, "commands", {}) if context.parent else {}
    if word in commands:
        raise typer.BadParameter(
            f"options stand before '{word}', which does not see them: put them behind"
        )
    raise typer.BadParameter(f"'{word}' belongs to no option: give the prompt as --prompt TEXT")


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
