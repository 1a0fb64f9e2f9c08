"""A trace of texts decoded together: whose tokens made a pass, and a replay counts the same."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from moepolicy import Context, ExpertCache, find_policy, outputs, replay_journal
from moeroute import DECODE, PROMPT, TraceError, open_trace, writer
from moerun.live.batch import BatchedGeneration
from moerun.live.passes import EventLog
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moesim import Workload, load_workload
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate

a_machine = Machine(
    "m", "", "measured", LinkProfile(1e8, 1e-5, 2), Compute(1e-4, 1e-4, expert_s=1e-5)
)
LENGTHS = [(5, 6), (14, 3), (9, 9), (3, 4), (12, 1), (6, 5)]
"""Of prompts, and of their answers."""
TEXTS = 3


def prompts(lengths: list[tuple[int, int]]) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(1, 200, (1, n), generator=drawn) for n, _ in lengths]


def served(
    runner: Runner, lengths: list[tuple[int, int]] = LENGTHS, *, reuse: bool = False
) -> list[BatchedGeneration]:
    """All texts, at most TEXTS at a time: one joins in each pass, as a server has them."""
    batch, made = runner.batch(), []
    wanted = list(zip(prompts(lengths), lengths, strict=True))
    while wanted or batch.rows:
        if wanted and len(batch.rows) < TEXTS:
            ids, (_, answer) = wanted.pop(0)
            made.append(runner.batched_generation(reuse=reuse))
            batch.add(made[-1], ids, Sampling(max_new_tokens=answer, stop=False))
        if batch.rows:
            batch.step()
    return made


def workload_of(trace: Path) -> Workload:
    opened = open_trace(trace)
    opened.validate()
    return load_workload(opened, predictions=opened.meta.horizon > 0)


@pytest.mark.parametrize(
    ("policy", "scope"), [("lru", "layer"), ("lfu", "global"), ("moe-infinity", "layer")]
)
def test_the_simulator_repeats_a_batch_event_for_event(
    stores: dict[str, ExpertStore], tmp_path: Path, policy: str, scope: str
) -> None:
    settings = Settings(find_policy(policy), slots=3, scope=scope, texts=TEXTS)
    with Runner(stores["native"], settings) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", None)
        made = served(runner)
        runner.session.settle()
        totals = runner.session.totals
        assert len(recording.finish()) == 2
    workload = workload_of(tmp_path / "t.parquet")
    document = json.loads((tmp_path / "j.json").read_text())
    live = [tuple(event) for event in document["events"]]
    log = EventLog()
    context = Context(*(document[n] for n in ("n_layers", "n_experts", "top_k", "slots", "scope")))
    cache = ExpertCache(context, find_policy(policy).build(context), observers=[log])
    steps = map(workload.step, range(workload.n_steps))
    replay_journal(cache, steps, [tuple(call) for call in document["calls"]])
    assert [tuple(event) for event in log.events] == live
    if policy == "moe-infinity":  # prefetches come as the clock has it
        return
    again = EventLog()
    found = simulate(workload, settings.policy, a_machine, slots=3, scope=scope, observers=(again,))
    assert [tuple(event) for event in again.events] == live
    assert (found.hits, found.misses) == (totals.hits, totals.misses)
    assert found.misses > 0
    assert workload.n_decoded == sum(len(each.token_ids) - 1 for each in made)


def test_a_trace_says_whose_tokens_made_a_pass(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    with Runner(stores["native"], Settings(find_policy("lru"), slots=3, texts=TEXTS)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", None, None)
        served(runner)
        recording.write_ended()
        assert recording.recorder.passes == []
        recording.finish()
    trace = open_trace(tmp_path / "t.parquet")
    columns = trace.arrays("sequence", "position", "phase", "pass_id", "layer")
    first = columns["layer"] == 0
    sequence, position, phase, made = (
        columns[name][first] for name in ("sequence", "position", "phase", "pass_id")
    )
    for number, (prompt, answer) in enumerate(LENGTHS):
        own = sequence == number
        assert position[own].tolist() == list(range(prompt + answer - 1))
        assert (phase[own] == PROMPT).sum() == prompt
        assert len(set(made[own & (phase == PROMPT)])) == 1  # read by itself, in one pass
        assert len(set(made[own & (phase == DECODE)])) == answer - 1
    for number in np.unique(made):
        of = made == number
        assert len(set(sequence[of])) == (of.sum() if (phase[of] == DECODE).all() else 1)
    together = np.bincount(made[phase == DECODE])
    assert together.max() == TEXTS
    # One step a layer for each pass.
    assert workload_of(tmp_path / "t.parquet").n_steps == len(np.unique(made)) * trace.meta.n_layers


def test_texts_go_to_disk_as_they_end(stores: dict[str, ExpertStore], tmp_path: Path) -> None:
    with Runner(stores["native"], Settings(find_policy("lru"), slots=3)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", None, None)
        for ids in prompts(LENGTHS):
            runner.generation().run(ids, Sampling(max_new_tokens=3, stop=False))
            recording.write_ended()
            assert recording.recorder.passes == []
        recording.finish()
    found = np.unique(open_trace(tmp_path / "t.parquet").array("sequence"))
    assert found.tolist() == list(range(len(LENGTHS)))


def test_a_prompt_that_was_left_is_there_as_far_as_it_was_read(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    with Runner(stores["native"], Settings(find_policy("lru"), slots=3)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", None)
        ids = prompts(LENGTHS)
        sampling = Sampling(max_new_tokens=4, stop=False)
        left = runner.generation()
        served_layers = 0

        def leave(*_: object) -> None:
            nonlocal served_layers
            served_layers += 1
            if served_layers == 2:
                left.cancel()

        runner.session.gate_observers.append(leave)
        assert left.run(ids[0], sampling).ending == "cancelled"
        runner.session.gate_observers.remove(leave)
        runner.generation().run(ids[1], sampling)
        runner.session.settle()
        totals = runner.session.totals
        recording.finish()
    trace = open_trace(tmp_path / "t.parquet")
    assert trace.meta.missing_rows == ids[0].shape[1] * (trace.meta.n_layers - 2)
    found = simulate(workload_of(tmp_path / "t.parquet"), find_policy("lru"), a_machine, slots=3)
    assert (found.hits, found.misses) == (totals.hits, totals.misses)


def test_a_recording_ends_where_the_session_starts_over(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    with Runner(stores["native"], Settings(find_policy("lru"), slots=3)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", None)
        ids, sampling = prompts(LENGTHS), Sampling(max_new_tokens=4, stop=False)
        runner.generation().run(ids[0], sampling)
        runner.session.reset()
        runner.generation().run(ids[1], sampling)
        recording.finish()
        assert recording.recorder.ended
    assert set(open_trace(tmp_path / "t.parquet").array("sequence").tolist()) == {0}
    document: dict[str, Any] = json.loads((tmp_path / "j.json").read_text())
    assert document["events"]


@pytest.mark.parametrize("module", [writer, outputs])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_trace_whose_name_is_not_on_the_disk_leaves_no_trace_without_a_journal(
    stores: dict[str, ExpertStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    module: Any,
) -> None:
    """The folder's sync fails after the trace or the journal has its name. Where a folder cannot be
    read, which EACCES says, names are not synced, and nothing is wrong."""
    real = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path) == tmp_path:
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    with Runner(stores["native"], Settings(find_policy("lru"), slots=3)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", None)
        served(runner, [(5, 2)])
        monkeypatch.setattr(module, "os", SimpleNamespace(**vars(os) | {"open": failing}))
        if number == errno.EACCES:
            recording.finish()
        else:
            with pytest.raises((TraceError, OSError), match=os.strerror(number)):
                recording.finish()
    left = ["j.json", "t.parquet"] if number == errno.EACCES else []
    assert sorted(path.name for path in tmp_path.iterdir()) == left
