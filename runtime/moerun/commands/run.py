"""What `moerun` does without a command: one prompt, answered and reported."""

from __future__ import annotations

import sys
from pathlib import Path

from moerun.devices import calm_collector
from moerun.generate import Sampling
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
        recording = (
            LiveRecording(runner, trace, journal, sampling.seed) if trace or journal else None
        )
        if recording:
            recording.recorder.begin_sequence()
        generation = runner.generation(_stream if streaming else None)
        interrupted = False
        try:
            generation.run(runner.encode(prompt), sampling)
        except KeyboardInterrupt:
            interrupted = True
            generation.timings.end()  # hands on the text it still holds back
        except BaseException:
            if recording:
                recording.discard()
            raise
        if recording:
            recording.finish()
        report = report_of(runner, generation.outcome(), interrupted=interrupted)
        text = runner.tokenizer.decode(generation.timings.token_ids, skip_special_tokens=True)
    if streaming:
        sys.stdout.write("\n")
        sys.stdout.flush()
    out = sys.stderr if streaming else sys.stdout
    out.write(render(report, format, text, provenance(sampling)))
    return interrupted


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
