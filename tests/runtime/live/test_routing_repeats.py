"""Live runs of policies that route, repeated from their traces: by the simulator, by journals."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from moepolicy import ExpertCache, Kind, find_policy, replay_journal
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.kernels.slots import SlotForm
from moerun.live import runner as runner_module
from moerun.live.passes import EventLog
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.gate import Gate
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from moesim.engines.choose import run as simulate
from moesim.engines.compilations import Compilations
from moesim.machine.costs import costs_of
from moesim.machine.profile import Compute, Cpu, LinkProfile, Machine
from moesim.sizes import sizes_of
from moesim.workload.loading import load_workload
from support.links import ShuffledLink
from support.moe_models import random_model, save_checkpoint

SUPPORT = Path(__file__).parents[2] / "support"
a_machine = Machine(
    "m",
    "",
    "measured",
    LinkProfile(1e8, 1e-5, 2),
    Compute(1e-4, 1e-4, expert_s=1e-5),
    cpu=Cpu(1, 1e-4),
)


def shuffled(seed: int) -> Any:
    """Stands for make_link: copies that end in random order."""

    def make(store: ExpertStore, form: SlotForm, chosen: Settings, n_slots: int) -> ShuffledLink:
        from moerun.live.assembly import make_slots

        slots = make_slots(form, chosen, n_slots)
        return ShuffledLink(store, slots, 2, seed, chosen.low)

    return patch.object(runner_module, "make_link", make)


@pytest.fixture(scope="module")
def unsorted(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """Of a model whose gate does not give its choice by descending weight."""
    folder = tmp_path_factory.mktemp("deepseek")
    model = random_model("deepseek_v3", num_experts_per_tok=3, max_position_embeddings=128)
    source = save_checkpoint(model, resolve("tiny"), folder / "model")
    return pack(source, folder / "store")


def record(runner: Runner, folder: Path) -> dict[str, Any]:
    recording = LiveRecording(runner, folder / "t.parquet", folder / "j.json", seed=0)
    gates: list[Gate] = []
    runner.session.gate_observers.append(lambda _layer, gate: gates.append(gate))
    generator = torch.Generator().manual_seed(0)
    for n_tokens in (14, 9):
        recording.recorder.begin_sequence()
        ids = torch.randint(3, 120, (1, n_tokens), generator=generator)
        runner.generation().run(ids, Sampling(max_new_tokens=6, stop=False))
    recording.finish()
    document: dict[str, Any] = json.loads((folder / "j.json").read_text())
    document["gates"] = gates
    return document


@pytest.mark.parametrize("model", ["tiny", "unsorted"])
@pytest.mark.parametrize(("scope", "link"), [("layer", "shuffled"), ("global", "disk")])
@pytest.mark.parametrize("policy", ["ToResidents:bias=2", "Second"])
def test_the_simulator_repeats_the_run_event_for_event(
    stores: dict[str, ExpertStore],
    unsorted: ExpertStore,
    tmp_path: Path,
    policy: str,
    scope: str,
    link: str,
    model: str,
) -> None:
    store = unsorted if model == "unsorted" else stores["native"]
    chosen = Settings(
        find_policy(f"{SUPPORT / 'routing.py'}:{policy}"), slots=3, scope=scope, streams=2
    )
    with shuffled(5) if link == "shuffled" else nullcontext(), Runner(store, chosen) as runner:
        document = record(runner, tmp_path)
        context, live = runner.context, runner.session.cache.arrays
        assert runner.session.totals.rerouted > 0
    trace = open_trace(tmp_path / "t.parquet")
    rule = trace.meta.weight_rule, trace.meta.weight_scale
    assert rule == runner.weight_rule
    workload = load_workload(trace, logits=True, rows=True)
    sizes = sizes_of(trace.meta, store.record_bytes)
    log = EventLog()
    cache, _ = simulate(
        workload,
        chosen.policy,
        context,
        costs_of(workload, a_machine, sizes, predicting=False, routing=True),
        compilations=Compilations(),
        observers=(log,),
    )
    assert [tuple(event) for event in log.events] == [tuple(e) for e in document["events"]]
    assert cache.mass.tolist() == live.mass.tolist()
    assert cache.counters.tolist() == live.counters.tolist()
    own = np.concatenate([np.sort(gate.ids, axis=1).ravel() for gate in document["gates"]])
    kept = np.sort(trace.array("experts"), axis=1)
    assert sorted(own.tolist()) == sorted(kept.ravel().tolist())  # the gates' own choice


@pytest.mark.parametrize("model", ["tiny", "unsorted"])
def test_the_journal_repeats_a_run_that_also_prefetches(
    stores: dict[str, ExpertStore], unsorted: ExpertStore, tmp_path: Path, model: str
) -> None:
    store = unsorted if model == "unsorted" else stores["native"]
    spec = find_policy(f"{SUPPORT / 'policies.py'}:Rerouting:seed=3")
    low = stores["2bit"] if model == "tiny" else store
    chosen = Settings(spec, slots=2, streams=2, low=low)
    with shuffled(9), Runner(store, chosen) as runner:
        document = record(runner, tmp_path)
        context, live = runner.context, runner.session.cache.arrays
    log = EventLog()
    trace = open_trace(tmp_path / "t.parquet")
    workload = load_workload(trace, logits=True, token_ids=True, rows=True)
    rule = workload.weight_rule
    cache = ExpertCache(
        context, spec.build(context), observers=[log], weight_rule=rule, max_slots=8
    )
    numbers = range(workload.n_steps)
    rows = [found for n in numbers if (found := workload.rows_of(n)) is not None]
    calls = [tuple(call) for call in document["calls"]]
    replay_journal(cache, map(workload.step, numbers), calls, rows)
    assert [tuple(event) for event in log.events] == [tuple(e) for e in document["events"]]
    assert cache.arrays.mass.tolist() == live.mass.tolist()
    happened = {event.kind for event in log.events}
    assert {Kind.COMPUTE, Kind.LOW, Kind.SPECULATE} <= happened


def test_moesim_replays_the_trace_of_a_live_run(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    label = f"{SUPPORT / 'routing.py'}:ToResidents:bias=2.0"
    with Runner(stores["native"], Settings(find_policy(label), slots=3)) as runner:
        record(runner, tmp_path)
        totals = runner.session.totals
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from moesim.cli import main; main()"),
            *("compare", label, "--trace", str(tmp_path / "t.parquet")),
            *("--machine", "t4", "--slots", "3", "--no-limits", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)
    assert (row["hits"], row["misses"]) == (totals.hits, totals.misses)
    assert row["rerouted"] == totals.rerouted > 0
    assert row["rerouted_share"] == pytest.approx(totals.rerouted_share)
