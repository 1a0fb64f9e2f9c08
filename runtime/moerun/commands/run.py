"""What `moerun` does without a command: one prompt, answered and reported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moerun.devices import calm_collector
from moerun.generate import Generation, Sampling
from moerun.record import LiveRecording
from moerun.report import Format, provenance, render, report_of
from moerun.runner import Runner, Settings
from moerun.store import ExpertStore


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
    with Runner(store, settings) as runner:
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
    out = sys.stderr if streaming else sys.stdout
    out.write(render(report, format, outcome.text, provenance(sampling)))
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


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
