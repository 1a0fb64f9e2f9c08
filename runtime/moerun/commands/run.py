"""What `moerun generate` does: one prompt, answered and reported."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from moepolicy import console
from moepolicy.console import emit, say
from moepolicy.statusline import StatusLine
from moepolicy.tables import Format, to_csv, to_json

from moerun.devices import freeze_loaded_objects
from moerun.live.generate import Generation
from moerun.live.prompt import encode
from moerun.live.recording import LiveRecording
from moerun.live.report import in_a_line, provenance, render, report_of
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.memory.fit import plan_memory
from moerun.offload.load import load_tokenizer
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore


def run(
    store: ExpertStore,
    settings: Settings,
    sampling: Sampling,
    prompt: str,
    *,
    trace: Path | None,
    journal: Path | None,
    format: Format,
    stats: bool = False,
) -> int:
    """Generate, stream, record and report; returns the command's exit code (see `exit_code`).

    ``stats``: a line on stderr says how it is going. An interrupted run still reports and records
    what it did until then.
    """
    streaming = format is Format.table
    settings = fitted(store, settings, sampling, prompt)
    with Runner(store, settings, report=say) as runner:
        tell_plan(runner)
        freeze_loaded_objects()
        prompt_ids = runner.encode(prompt)
        recorded = trace is not None or journal is not None
        recording = LiveRecording(runner, trace, journal, sampling.seed) if recorded else None
        generation = runner.generation(emit if streaming else None)
        try:
            line = StatusLine(lambda: in_a_line(generation.work())) if stats else nullcontext()
            with line:
                interrupted = _answer(generation, prompt_ids, sampling, recording)
        finally:
            if streaming:
                emit("\n")
        outcome = generation.outcome()
        report = report_of(runner, outcome, interrupted=interrupted)
        if outcome.ending == "length" and outcome.new_tokens < sampling.max_new_tokens:
            say(f"the text ends here: the context of {runner.limit_tokens} tokens is full")
        if journal is not None and runner.session.policy_failure is not None:
            say(f"{journal} is not written: no journal can repeat a run whose policy failed")
    shown = render(report, format, outcome.text, provenance(sampling))
    if streaming:
        sys.stderr.write(shown)
    else:
        emit(shown)
    if interrupted:
        files = " and ".join(str(path) for path in (trace, journal) if path is not None)
        console.say_interrupted(f"the text ends here{f', and {files} with it' if files else ''}")
    return exit_code(runner, interrupted=interrupted)


def exit_code(runner: Runner, *, interrupted: bool) -> int:
    """The exit code of a run that has ended: 130 after an interruption, 1 where the policy failed
    and LRU went on, else 0."""
    if interrupted:
        return console.INTERRUPTED
    return int(runner.session.policy_failure is not None)


def _answer(
    generation: Generation,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    recording: LiveRecording | None,
) -> bool:
    """Generate and write the recording; True when the user interrupted it."""
    interrupted = False
    try:
        generation.run(prompt_ids, sampling)
    except KeyboardInterrupt:
        interrupted = True
        generation.end_text()
    except BaseException:
        if recording:
            recording.discard()
        raise
    if recording:
        recording.finish()
    return interrupted


def show_plan(
    store: ExpertStore, settings: Settings, sampling: Sampling, prompt: str | None, format: Format
) -> None:
    """Print the memory plan of a run that is not made. Raises RunError where it cannot be."""
    if prompt is not None:
        settings = fitted(store, settings, sampling, prompt)
    print_plan(store, settings, format)


def print_plan(store: ExpertStore, settings: Settings, format: Format) -> None:
    """Print what would take how much memory. Raises RunError where it cannot be."""
    plan = plan_memory(store, settings)
    if format is Format.table:
        emit(plan.table())
    else:
        row = plan.to_json()
        emit(to_json(row) if format is Format.json else to_csv([row]))


def fitted(store: ExpertStore, settings: Settings, sampling: Sampling, prompt: str) -> Settings:
    """Settings whose memory is planned for just this prompt and its answer."""
    tokens = encode(load_tokenizer(store.path), prompt, torch.device("cpu")).shape[1]
    context = settings.context_tokens or tokens + sampling.max_new_tokens
    return replace(settings, context_tokens=context, prompt_tokens=tokens)


def tell_plan(runner: Runner) -> None:
    """How the memory is spent, where a budget was given."""
    if runner.settings.memory_bytes is not None:
        say(runner.plan.table().rstrip())
