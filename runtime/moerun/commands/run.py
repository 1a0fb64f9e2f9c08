"""What `moerun generate` does: one prompt, answered and reported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from moepolicy.console import emit
from moepolicy.tables import Format, to_csv, to_json

from moerun.devices import calm_collector
from moerun.live.generate import Generation
from moerun.live.prompt import encode
from moerun.live.recording import LiveRecording
from moerun.live.report import provenance, render, report_of
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
) -> bool:
    """Generate, stream, record and report; True when the user interrupted it.

    An interrupted run still reports and records what it did until then.
    """
    streaming = format is Format.table
    settings = fitted(store, settings, sampling, prompt)
    with Runner(store, settings, report=say) as runner:
        tell_plan(runner)
        calm_collector()
        prompt_ids = runner.encode(prompt)
        recorded = trace is not None or journal is not None
        recording = LiveRecording(runner, trace, journal, sampling.seed) if recorded else None
        generation = runner.generation(_stream if streaming else None)
        try:
            interrupted = _answer(generation, prompt_ids, sampling, recording)
        finally:
            if streaming:
                _stream("\n")
        outcome = generation.outcome()
        report = report_of(runner, outcome, interrupted=interrupted)
        if outcome.ending == "length" and outcome.new_tokens < sampling.max_new_tokens:
            say(f"the text ends here: the context of {runner.limit_tokens} tokens is full")
    shown = render(report, format, outcome.text, provenance(sampling))
    if streaming:
        sys.stderr.write(shown)
    else:
        emit(shown)
    return interrupted


def _answer(
    generation: Generation,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    recording: LiveRecording | None,
) -> bool:
    """Generate and write the recording; True when the user interrupted it."""
    interrupted = False
    if recording:
        recording.recorder.begin_sequence()
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


def say(text: str) -> None:
    """Write a line to stderr at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _stream(text: str) -> None:
    emit(text)
