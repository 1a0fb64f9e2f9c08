"""A budget is planned before anything is loaded, kept to, and may change during a generation."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import PolicyError, find_policy, replay_journal
from moerun.amounts import parse_bytes
from moerun.checkpoint.hub import resolve
from moerun.devices import resident_bytes
from moerun.errors import RunError
from moerun.live import runner as runner_module
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.memory import fit as planning
from moerun.memory.budget import parse_budget
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.big_models import big_linear_store, big_published_store, big_store
from support.runs import generate

SHARING_AHEAD = f"{Path(__file__).parents[2] / 'support' / 'policies.py'}:SharingAhead"
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
CPU = torch.device("cpu")
MIB = 1 << 20
PATIENCE_S = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "tiny")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return big_store(tmp_path_factory.mktemp("big"))


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from moerun.cli import main; main()", *map(str, arguments)]


def main_exits(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    from moerun.cli import main

    monkeypatch.setattr(sys, "argv", ["moerun", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def test_the_slots_are_what_the_rest_leaves(tiny: ExpertStore) -> None:
    policy = find_policy("lru-spec")  # 4 staging buffers
    row = tiny.n_layers * tiny.record_bytes
    with Runner(tiny, Settings(policy, slots=0, context_tokens=64)) as runner:
        least = runner.plan.least_bytes
        assert least == runner.plan.needs.total_bytes + 4 * tiny.record_bytes
    for budget, slots in ((least, 0), (least + 3 * row, 3), (least + 4 * row - 1, 3)):
        chosen = Settings(policy, memory_bytes=budget, context_tokens=64)
        with Runner(tiny, chosen) as runner:
            assert runner.context.slots == slots
            assert runner.plan.total_bytes <= budget
            assert generate(runner, PROSE, Sampling(max_new_tokens=2))


def test_packed_attention_is_planned_at_its_own_size(tmp_path: Path) -> None:
    from moerun.offload.attention import PackedLinear, packed_attention_bytes

    store = pack(resolve("tiny"), tmp_path / "packed", attention="4bit")
    with Runner(store, Settings(find_policy("lru"), slots=1)) as runner:
        held = sum(p.nbytes for p in {p.data_ptr(): p for p in runner.model.parameters()}.values())
        packed = [m for m in runner.model.modules() if isinstance(m, PackedLinear)]
        held += packed_attention_bytes(store, CPU)
        assert packed
        assert runner.plan.needs.weights_bytes == held


def test_too_small_a_budget_is_refused_with_the_smallest_that_works(
    tiny: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def budget(n_bytes: int) -> Settings:
        return Settings(find_policy("lru"), memory_bytes=n_bytes, context_tokens=64)

    with pytest.raises(RunError, match=r"least that works is (\d+MiB)") as caught:
        Runner(tiny, budget(MIB))
    (least,) = re.findall(r"least that works is (\d+MiB)", str(caught.value))
    with Runner(tiny, budget(parse_bytes(least))) as runner:
        assert generate(runner, PROSE, Sampling(max_new_tokens=2))
    monkeypatch.setattr(runner_module, "load_offloaded", None)  # not to be reached
    with pytest.raises(RunError, match=f"least that works is {least}"):
        Runner(tiny, budget(parse_bytes(least) - MIB))


def test_memory_that_is_not_free_is_refused_before_loading(
    tiny: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "load_offloaded", None)
    monkeypatch.setattr(planning, "free_bytes", lambda _: 20 * MIB)
    with pytest.raises(RunError, match=r"cpu has 20\.00 MiB free: give less --memory"):
        Runner(tiny, Settings(find_policy("lru"), memory_bytes=1 << 40))


def test_gpu_memory_that_others_hold_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for name, n_bytes in (("memory_reserved", 100 * MIB), ("memory_allocated", 60 * MIB)):
        monkeypatch.setattr(torch.cuda, name, lambda _, n_bytes=n_bytes: n_bytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500 * MIB, 8000 * MIB))
    planning.require_free(540 * MIB, 1 << 40, gpu)
    holds = (
        r"cuda:0 has 540\.00 MiB free \(500\.00 MiB of 7\.81 GiB are; other programs and CUDA "
        r"itself hold 7\.23 GiB\)"
    )
    with pytest.raises(RunError, match=holds):
        planning.require_free(541 * MIB, 1 << 40, gpu)


def test_auto_takes_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from moerun.memory import budget

    monkeypatch.setattr(budget, "free_bytes", lambda _: 10_000 * MIB)
    assert parse_budget("auto", CPU) == 9_000 * MIB
    assert parse_budget("2GiB", CPU) == 2048 * MIB
    monkeypatch.setattr(budget, "free_bytes", lambda _: 100 * MIB)
    assert parse_budget("auto", CPU) == 0


def test_text_beyond_the_planned_context_is_refused_or_cut(tiny: ExpertStore) -> None:
    chosen = Settings(find_policy("lru"), memory_bytes=100 * MIB, context_tokens=30)
    with Runner(tiny, chosen) as runner:
        ids = runner.encode(PROSE)
        assert ids.shape[1] < 30
        done = runner.generation().run(ids, Sampling(max_new_tokens=100, stop=False))
        assert len(done.token_ids) == 30 - ids.shape[1]
        with pytest.raises(RunError, match="planned for a context of 30"):
            runner.generation().run(runner.encode(PROSE * 2), Sampling())


def test_the_plan_can_be_asked_for_without_a_run(
    tiny: ExpertStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "load_offloaded", None)  # not to be reached
    arguments = ("--model", str(tiny.path), "--plan", "--memory", "70MiB", "--format", "json")
    assert main_exits(monkeypatch, *arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    parts = ("weights", "kv_cache", "workspace", "staging", "slots")
    assert sum(plan[f"{part}_bytes"] for part in parts) == plan["total_bytes"]
    assert plan["total_bytes"] <= plan["budget_bytes"] == 70 * MIB


@pytest.mark.parametrize(
    "arguments",
    [(), pytest.param(("--policy", "lru-spec", "--context", "1400"), marks=pytest.mark.slow)],
)
def test_a_run_keeps_to_its_budget(big: ExpertStore, arguments: tuple[str, ...]) -> None:
    keeps_to_its_budget(big, arguments)


@pytest.mark.slow
def test_a_run_keeps_to_its_budget_with_a_prompt_in_chunks(big: ExpertStore) -> None:
    keeps_to_its_budget(big, ("--prompt-chunk", "256"), budget=250 * MIB)


@pytest.mark.slow
def test_a_run_keeps_to_its_budget_with_linear_attention(tmp_path: Path) -> None:
    keeps_to_its_budget(big_linear_store(tmp_path), ("--context", "1400"))


@pytest.mark.slow
def test_a_run_keeps_to_its_budget_with_experts_as_published(tmp_path: Path) -> None:
    keeps_to_its_budget(big_published_store(tmp_path), ())


def keeps_to_its_budget(
    big: ExpertStore, arguments: tuple[str, ...], budget: int = 330 * MIB
) -> None:
    done = subprocess.run(
        command(
            *("--model", big.path, "--memory", f"{budget // MIB}MiB", "--format", "json"),
            *("--prompt", PROSE * 42, "--max-new-tokens", "12", *arguments),
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^slots +[\d.]+ MiB  \d of 8 experts", done.stderr, re.MULTILINE)
    report = json.loads(done.stdout)
    assert 0 < report["slots"] < 8
    assert report["prompt_tokens"] > 1000
    assert report["memory_peak_bytes"] <= budget
    # And the plan is not all caution: most of it is used.
    assert report["memory_peak_bytes"] > 0.6 * report["memory_planned_bytes"]


def reference(store: ExpertStore, tokens: int) -> list[int]:
    with Runner(store, Settings(find_policy("lru"), slots=4)) as runner:
        ids = runner.encode(PROSE)
        done = runner.generation().run(ids, Sampling(max_new_tokens=tokens, stop=False))
    return done.token_ids


@pytest.mark.parametrize("policy", ["lru", "lru-spec", "lru-spec:n=1,staging=1"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_budget_may_change_while_text_is_generated(
    tiny: ExpertStore, policy: str, scope: str
) -> None:
    expected = reference(tiny, 30)
    chosen = Settings(find_policy(policy), slots=3, scope=scope, streams=2, context_tokens=128)
    with Runner(tiny, chosen) as runner:
        runner.set_memory(1 << 30)
        done = threading.Event()
        changes: list[int] = []

        def change() -> None:
            row = tiny.n_layers * tiny.record_bytes
            while not done.is_set():
                for slots in (0, 8, 1, 5, 2, 7, 3):
                    if slots % 2:
                        runner.set_memory(runner.plan.least_bytes + slots * row)
                    else:
                        runner.session.resize(slots)
                    changes.append(slots)
                    time.sleep(0.002)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            ids = runner.encode(PROSE)
            found = runner.generation().run(ids, Sampling(max_new_tokens=30, stop=False))
        finally:
            done.set()
            thread.join()
        assert found.token_ids == expected
        assert len(changes) > 40
        runner.session.settle()
        runner.session.cache.check()
        assert runner.session.cache.n_slots == tiny.n_layers * 3 + runner.plan.staging
        runner.session.reset()
        again = runner.generation().run(ids, Sampling(max_new_tokens=30, stop=False))
        assert again.token_ids == expected


def test_what_a_smaller_budget_takes_away_goes_back_to_the_system(big: ExpertStore) -> None:
    with Runner(big, Settings(find_policy("lru"), slots=8)) as runner:
        for layer in range(big.n_layers):
            list(runner.session.serve(layer, torch.arange(8)[:, None], torch.ones(8, 1)))
        slot = weakref.ref(runner.session.link.slots[0])
        full = resident_bytes()
        runner.session.resize(1)
        gc.collect()
        assert full - resident_bytes() > 0.9 * 7 * big.n_layers * big.record_bytes
        runner.session.resize(0)
        assert slot() is None
        runner.session.resize(8)
        assert resident_bytes() < full - 0.5 * 7 * big.n_layers * big.record_bytes


def test_a_change_that_cannot_be_leaves_all_as_it_was(
    tiny: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=2, context_tokens=64)) as runner:
        with pytest.raises(RunError, match="least that works"):
            runner.set_memory(MIB)
        with pytest.raises(PolicyError, match="made for 8 slots a layer cannot have 9"):
            runner.session.resize(9)
        arena: Any = runner.session.link.slots
        make = arena._make_slot
        made: list[Any] = []

        def until_full() -> Any:
            if len(made) == 20:
                raise RunError("an expert slot takes 192 KiB, which cpu does not have free")
            made.append(make())
            return made[-1]

        monkeypatch.setattr(arena, "_make_slot", until_full)
        with pytest.raises(RunError, match="does not have free"):
            runner.session.resize(8)
        assert (runner.context.slots, runner.plan.slots) == (2, 2)
        runner.session.cache.check()
        assert sum(slot is not None for slot in arena) == 2 * tiny.n_layers + 1
        assert generate(runner, PROSE, Sampling(max_new_tokens=3))


@pytest.mark.parametrize("policy", ["lru-spec", SHARING_AHEAD])
def test_a_recorded_run_with_changes_repeats_from_its_journal(
    policy: str, tiny: ExpertStore, tmp_path: Path
) -> None:
    from moepolicy import Context, ExpertCache
    from moeroute import open_trace
    from moerun.live.passes import EventLog
    from moerun.live.recording import LiveRecording
    from moesim.workload.loading import load_workload

    trace, journal = tmp_path / "t.parquet", tmp_path / "j.json"
    with Runner(tiny, Settings(find_policy(policy), slots=2, horizon=1)) as runner:
        recording = LiveRecording(runner, trace, journal, seed=0)
        sizes = iter([7, 1, 4, 0, 3, 8, 2] * 40)

        def resize(layer: int, _gate: object) -> None:
            if layer % 3 == 1:
                runner.session.resize(next(sizes))

        runner.session.gate_observers.append(resize)
        recording.recorder.begin_sequence()
        runner.generation().run(runner.encode(PROSE), Sampling(max_new_tokens=6))
        recording.finish()
    document = json.loads(journal.read_text())
    assert document["slots"] == 2
    log = EventLog()
    names = ("n_layers", "n_experts", "top_k", "slots", "scope")
    context = Context(*(document[name] for name in names))
    again = find_policy(document["policy"]).build(context)
    cache = ExpertCache(context, again, observers=[log], max_slots=8)
    workload = load_workload(open_trace(trace), predictions=True)
    steps = map(workload.step, range(workload.n_steps))
    replay_journal(cache, steps, [tuple(call) for call in document["calls"]])
    assert [list(event) for event in log.events] == document["events"]


@pytest.mark.slow
def test_a_file_changes_the_budget_of_a_running_process(tiny: ExpertStore, tmp_path: Path) -> None:
    budget = tmp_path / "budget"
    budget.write_text("80MiB\n")
    arguments = ("--model", tiny.path, "--prompt", PROSE, "--max-new-tokens", "80")
    process = subprocess.Popen(
        command(*arguments, "--memory-file", budget, "--link-gbps", "0.02"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    said = []
    with process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("total"):
                budget.write_text("56MiB\n")
            elif line.startswith("memory: 56.00 MiB from now on"):
                budget.write_text("nonsense\n")
            elif line.startswith("memory: unchanged, since"):
                budget.write_text("60MiB\n")
        out = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    text = "".join(said)
    assert "'nonsense' is no amount of memory" in text
    assert "memory: 60.00 MiB from now on" in text
    assert "taken of 60.00 MiB" in text
    with Runner(tiny, Settings(find_policy("lru"), slots=4)) as runner:
        expected = generate(runner, PROSE, Sampling(max_new_tokens=80))
    assert out.strip() == expected.strip()


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("--memory", "9GiB", "--slots", "2"), "not both", 2),
        (("--memory-file", "missing"), "missing is not there", 1),
        (("--memory", "9GiB", "--context", "1"), "context must be 2 or more", 2),
        (("--prompt-chunk", "0"), "--prompt-chunk must be 1 or more", 2),
        (("--context", "100"), "--memory plans for", 2),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: tuple[str, ...],
    says: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main_exits(monkeypatch, "--prompt", "a", *arguments) == code
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
