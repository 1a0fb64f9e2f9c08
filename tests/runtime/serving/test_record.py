"""What `moerun serve --record` leaves: a trace of all that was answered, together or in turn."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from moepolicy import find_policy
from moeroute import DECODE, open_trace
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moesim import load_workload
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate
from support.serving import answering, answers_together, serving

a_machine = Machine(
    "m", "", "measured", LinkProfile(1e8, 1e-5, 2), Compute(1e-4, 1e-4, expert_s=1e-5)
)
PROMPTS = ["It was the best of times", "It was", "the age of wisdom, it was the age", "We had"]


def simulated(trace: Path, slots: int) -> tuple[int, int]:
    """Hits and misses that the simulator counts for a served trace."""
    opened = open_trace(trace)
    opened.validate()
    found = simulate(load_workload(opened), find_policy("lru"), a_machine, slots=slots)
    return found.hits, found.misses


@pytest.mark.parametrize("texts", [1, 3])
def test_what_is_served_can_be_replayed(
    texts: int, stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    settings = Settings(find_policy("lru"), slots=3, texts=texts, exact_reuse=texts == 3)
    path = tmp_path / "served.parquet"
    with Runner(stores["native"], settings) as runner:
        recording = LiveRecording(runner, path, None, None)
        with answering(runner, recording=recording, queue=16) as service:
            asked = [{"prompt": prompt, "max_tokens": 7} for prompt in PROMPTS * 2]
            answers = answers_together(service, "/v1/completions", asked)
            assert [each.status_code for each in answers] == [200] * 8
        runner.session.settle()
        totals = runner.session.totals
        assert recording.finish() == [path]
    trace = open_trace(path)
    assert len(np.unique(trace.array("sequence"))) == 8
    assert simulated(path, 3) == (totals.hits, totals.misses)
    decoded = trace.array("pass_id")[(trace.array("phase") == DECODE) & (trace.array("layer") == 0)]
    assert (np.bincount(decoded).max() > 1) == (texts > 1)


@pytest.mark.slow
def test_the_command_writes_its_trace_when_it_ends(tmp_path: Path) -> None:
    trace = tmp_path / "served.parquet"
    arguments = ("--slots", "3", "--max-batch", "3", "--record", trace, "--queue", "16")
    with serving(tmp_path, *arguments) as server:
        client = server.client()

        def ask(prompt: str) -> int:
            answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=20)
            return int(answer.usage.completion_tokens) if answer.usage else 0

        with ThreadPoolExecutor(6) as clients:
            assert list(clients.map(ask, PROMPTS * 2)) == [20] * 8
        assert not trace.exists()
        code, said = server.end(signal.SIGTERM)
    assert code == 0, said
    wanted = re.search(r"([\d,]+) wanted", said)
    assert wanted is not None, said
    assert sum(simulated(trace, 3)) == int(wanted[1].replace(",", ""))


@pytest.mark.slow
def test_a_server_without_a_request_leaves_no_file(tmp_path: Path) -> None:
    trace = tmp_path / "served.parquet"
    with serving(tmp_path, "--record", trace) as server:
        code, said = server.end(signal.SIGTERM)
    assert code == 0
    assert "served.parquet is not written: nothing was recorded" in said
    assert list(tmp_path.glob("served*")) == []
