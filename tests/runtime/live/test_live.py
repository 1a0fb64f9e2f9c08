"""Live runs of real models: stock logits under every lossless policy, and runs that repeat."""

from __future__ import annotations

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, Kind, find_policy, policy_names, replay_journal
from moeroute import DECODE, PROMPT, Trace, open_trace
from moerun.checkpoint.hub import resolve
from moerun.kernels.slots import SlotForm
from moerun.live import runner as runner_module
from moerun.live.passes import EventLog
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.policies import unserved
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from moesim import Workload, load_workload
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate
from support.links import ShuffledLink
from support.moe_models import random_model, save_checkpoint
from support.runs import generate
from transformers import AutoModelForCausalLM

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
CODE = "def main(arguments):\n    for name in sorted(arguments):\n"
LOSSLESS = sorted(
    name
    for name in policy_names()
    if not find_policy(name).policy.lossy and not unserved(find_policy(name))
)
SHARING = f"{Path(__file__).parents[2] / 'support' / 'policies.py'}:Sharing"
N_EXPERTS = 8
a_machine = Machine(
    "m", "", "measured", LinkProfile(1e8, 1e-5, 2), Compute(1e-4, 1e-4, expert_s=1e-5)
)
few = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a live run takes minutes
)

OWN = Path(__file__).parents[2] / "support" / "policies.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "tiny")


@pytest.fixture(scope="module")
def stock() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()


def shuffled(streams: int, seed: int) -> Any:
    """Stands for make_link: the same store and slots, copies that end in random order."""

    def make(store: ExpertStore, form: SlotForm, chosen: Settings, n_slots: int) -> ShuffledLink:
        arena = torch.empty((n_slots, form.slot_bytes), dtype=torch.uint8)
        slots = [form.bind(memory) for memory in arena]
        return ShuffledLink(store, slots, streams, seed)

    return patch.object(runner_module, "make_link", make)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, decoded: int = 4) -> torch.Tensor:
    """Of a prompt in one pass, then of single tokens after it."""
    n = ids.shape[1] - decoded
    out = model(ids[:, :n], use_cache=True)
    found = [out.logits]
    for i in range(n, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@few
@given(
    policy=st.sampled_from([*LOSSLESS, *(f"lru-spec:staging={b}" for b in (1, 2, 3, 4))]),
    slots=st.integers(0, N_EXPERTS),
    scope=st.sampled_from(["layer", "global"]),
    streams=st.integers(1, 3),
)
def test_logits_are_the_stock_models_bit_for_bit(
    tiny: ExpertStore, stock: Any, policy: str, slots: int, scope: str, streams: int
) -> None:
    chosen = Settings(find_policy(policy), slots=slots, scope=scope, streams=streams)
    with Runner(tiny, chosen) as runner:
        for text in (PROSE, CODE):  # the second one finds a warm cache
            ids = runner.encode(text)
            assert torch.equal(logits_of(runner.model, ids), logits_of(stock, ids))
        assert runner.session.totals.requests > 0
        runner.session.cache.check()


def test_generated_tokens_are_the_stock_models(tiny: ExpertStore, stock: Any) -> None:
    with Runner(tiny, Settings(find_policy("lru-spec"), slots=3)) as runner:
        ids = runner.encode(PROSE)
        generated = runner.generation().run(ids, Sampling(max_new_tokens=16))
    expected = stock.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert generated.token_ids == expected.tolist()


def test_sampling_repeats_with_its_seed(tiny: ExpertStore) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=8)) as runner:
        texts = [
            generate(runner, PROSE, Sampling(12, temperature=1.0, top_p=0.95, seed=seed))
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


def record(
    runner: Runner, folder: Path, texts: tuple[str, ...] = (PROSE, CODE), new_tokens: int = 8
) -> tuple[Path, dict[str, Any]]:
    """Generate from each text and write trace and journal."""
    trace, journal = folder / "live.parquet", folder / "live.json"
    recording = LiveRecording(runner, trace, journal, seed=0)
    for text in texts:
        recording.recorder.begin_sequence()
        runner.generation().run(runner.encode(text), Sampling(max_new_tokens=new_tokens))
    recording.finish()
    return trace, json.loads(journal.read_text())


def workload_of(trace: Path) -> Workload:
    opened = open_trace(trace)
    opened.validate()
    return load_workload(opened, predictions=opened.meta.horizon > 0)


def events_of(document: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(event) for event in document["events"]]


@pytest.mark.parametrize("link", ["disk", "shuffled"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "random:seed=7", "adapmoe-slots", SHARING])
def test_without_prefetching_the_simulator_repeats_the_run_event_for_event(
    tiny: ExpertStore, tmp_path: Path, policy: str, scope: str, link: str
) -> None:
    chosen = Settings(find_policy(policy), slots=3, scope=scope, streams=2)
    links = shuffled(2, 5) if link == "shuffled" else nullcontext()
    with links, Runner(tiny, chosen) as runner:
        trace, document = record(runner, tmp_path)
    log = EventLog()
    result = simulate(
        workload_of(trace).calibrated(open_trace("tiny").expert_counts()),
        chosen.policy,
        a_machine,
        slots=3,
        scope=scope,
        observers=(log,),
    )
    assert [tuple(event) for event in log.events] == events_of(document)
    assert result.misses > 0


@pytest.mark.slow
@few
@given(
    n=st.integers(1, 3),
    staging=st.integers(1, 4),
    slots=st.integers(0, N_EXPERTS),
    scope=st.sampled_from(["layer", "global"]),
    streams=st.integers(1, 3),
    horizon=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    disk=st.booleans(),
)
def test_with_prefetching_the_journal_and_the_trace_repeat_the_run_event_for_event(
    tiny: ExpertStore,
    tmp_path: Path,
    n: int,
    staging: int,
    slots: int,
    scope: str,
    streams: int,
    horizon: int,
    seed: int,
    disk: bool,
) -> None:
    policy = find_policy(f"lru-spec:n={n},staging={staging}")
    chosen = Settings(policy, slots=slots, scope=scope, streams=streams, horizon=horizon)
    links = nullcontext() if disk else shuffled(streams, seed)
    with links, Runner(tiny, chosen) as runner:
        trace, document = record(runner, tmp_path)
    again = replay(workload_of(trace), document)
    assert again == events_of(document)
    assert Kind.QUEUE_PREFETCH in {event[0] for event in again}


@pytest.mark.parametrize("seed", [1, 2])
def test_predictions_that_a_policy_declines_are_as_if_they_were_not_recorded(
    tiny: ExpertStore, tmp_path: Path, seed: int
) -> None:
    """A recording has the predictions of every step, and the policy sees those it wanted."""
    policy = find_policy(f"{OWN}:Declining:seed={seed}")
    with Runner(tiny, Settings(policy, slots=3)) as runner:
        trace, document = record(runner, tmp_path)
        live = vars(runner.session.cache.policy)["shown"].tolist()
    again = replay(workload_of(trace), document)
    assert again == events_of(document)
    assert Kind.QUEUE_PREFETCH in {event[0] for event in again}
    assert live[0] > 0
    assert live[1] > 0


def replay(workload: Workload, document: dict[str, Any]) -> list[tuple[int, ...]]:
    """The decisions of a journal's policy, fed with a trace's steps and no clock."""
    context = Context(
        document["n_layers"],
        document["n_experts"],
        document["top_k"],
        document["slots"],
        document["scope"],
    )
    log = EventLog()
    cache = ExpertCache(context, find_policy(document["policy"]).build(context), observers=[log])
    steps = map(workload.step, range(workload.n_steps))
    replay_journal(cache, steps, [tuple(call) for call in document["calls"]])
    return [tuple(event) for event in log.events]


def test_a_trace_holds_what_the_gates_said(tiny: ExpertStore, stock: Any, tmp_path: Path) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=4, horizon=2)) as runner:
        ids = runner.encode(PROSE)
        trace_path, _ = record(runner, tmp_path, (PROSE,), new_tokens=5)
    trace = open_trace(trace_path)
    meta = trace.meta
    n_prompt = ids.shape[1]
    assert (meta.source, meta.horizon, meta.prediction) == ("live", 2, "own-norm")
    assert (meta.model, meta.notes["policy"], meta.notes["slots"]) == ("tiny", "lru", "4")
    assert meta.expert_bytes[meta.precision or ""] == tiny.record_bytes
    # The first new token comes out of the prompt's pass; the last is not fed back.
    n_tokens = n_prompt + 4
    assert trace.n_rows == n_tokens * tiny.n_layers
    columns = trace.arrays("position", "phase", "layer", "token_id", "experts", "router_logits")
    phase = columns["phase"].reshape(n_tokens, -1)
    assert (phase[:n_prompt] == PROMPT).all()
    assert (phase[n_prompt:] == DECODE).all()
    assert columns["position"].reshape(n_tokens, -1)[:, 0].tolist() == list(range(n_tokens))
    tokens = columns["token_id"].reshape(n_tokens, -1)[:, 0]
    assert tokens[:n_prompt].tolist() == ids[0].tolist()
    gates = stock_gates(stock, torch.tensor(tokens.astype(np.int64))[None, :n_prompt])
    own = columns["router_logits"].reshape(n_tokens, tiny.n_layers, -1)[:n_prompt]
    assert np.array_equal(own, gates)
    check_predictions(trace, own_of=columns["router_logits"], n_layers=tiny.n_layers)


@torch.no_grad()
def stock_gates(model: Any, ids: torch.Tensor) -> np.ndarray[Any, Any]:
    """The stock gates' logits for a prompt: float16[tokens, layers, experts]."""
    logits = model(ids, output_router_logits=True).router_logits
    return torch.stack(logits, dim=1).to(torch.float16).numpy()


def check_predictions(trace: Trace, own_of: np.ndarray[Any, Any], n_layers: int) -> None:
    """Null where there is no earlier layer, else closer to the row's gate than to the next's."""
    for ahead in (1, 2):
        guess = trace.array(f"predicted_logits_{ahead}").astype(np.float32)
        layers = trace.array("layer")
        assert np.isnan(guess[layers < ahead]).all()
        known = layers >= ahead
        assert not np.isnan(guess[known]).any()
        own = own_of.astype(np.float32)
        top = np.argsort(-own, axis=1)[:, :2]
        guessed = np.argsort(-guess, axis=1)[:, :2]
        recall = np.mean(
            [len({*a} & {*b}) / 2 for a, b in zip(top[known], guessed[known], strict=True)]
        )
        assert recall > 0.4  # chance is 0.25


class StopAfter:
    """Interrupts a generation like Ctrl-C, as its n-th layer is about to be served."""

    def __init__(self, runner: Runner, n: int) -> None:
        self._left = n
        runner.session.gate_observers.append(self)

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_what_it_did(tiny: ExpertStore, tmp_path: Path) -> None:
    trace, journal = tmp_path / "live.parquet", tmp_path / "live.json"
    with Runner(tiny, Settings(find_policy("lru-spec"), slots=3)) as runner:
        recording = LiveRecording(runner, trace, journal, seed=0)
        recording.recorder.begin_sequence()
        StopAfter(runner, 6 * tiny.n_layers + 3)
        generation = runner.generation()
        with pytest.raises(KeyboardInterrupt):
            generation.run(runner.encode(PROSE), Sampling(max_new_tokens=50))
        recording.finish()
        outcome = generation.outcome()
    assert len(outcome.token_ids) == 6
    assert outcome.decode_s > 0
    document = json.loads(journal.read_text())
    workload = workload_of(trace)
    assert workload.n_steps == 6 * tiny.n_layers
    assert replay(workload, document) == events_of(document)


def test_a_run_interrupted_before_its_first_pass_leaves_no_files(
    tiny: ExpertStore, tmp_path: Path
) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=3)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", seed=0)
        StopAfter(runner, 3)
        with pytest.raises(KeyboardInterrupt):
            runner.generation().run(runner.encode(PROSE), Sampling())
        recording.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_trace_whose_journal_gets_no_name_is_not_left(
    tiny: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(finished: Path, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with Runner(tiny, Settings(find_policy("lru"), slots=3)) as runner:
        monkeypatch.setattr("moepolicy.outputs.settle", failing)  # of the journal alone
        with pytest.raises(OSError, match=r"live\.json"):
            record(runner, tmp_path, (PROSE,), 2)
    assert list(tmp_path.iterdir()) == []


def test_predictions_are_made_only_where_something_looks_at_them(tiny: ExpertStore) -> None:
    with Runner(tiny, Settings(find_policy("lru"))) as runner:
        assert runner.predictor is None
    with Runner(tiny, Settings(find_policy("lru-spec"))) as runner:
        assert runner.predictor is not None
        assert runner.predictor.horizon == 1


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_other_families_repeat_too(family: str, tmp_path: Path) -> None:
    source = save_checkpoint(random_model(family), resolve("tiny"), tmp_path / "model")
    store = pack(source, tmp_path / "store")
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(1, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    with Runner(store, Settings(find_policy("lru-spec"), slots=2, streams=2)) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", tmp_path / "j.json", seed=0)
        recording.recorder.begin_sequence()
        assert torch.equal(logits_of(runner.model, ids), logits_of(stock, ids))
        recording.finish()
    document = json.loads((tmp_path / "j.json").read_text())
    assert replay(workload_of(tmp_path / "t.parquet"), document) == events_of(document)


@pytest.mark.parametrize("precision", ["4bit", "2bit"])
def test_quantised_experts_run_from_their_records(precision: str, tmp_path: Path) -> None:
    store = pack(resolve("tiny"), tmp_path / precision, precision=precision)
    texts = []
    for slots in (N_EXPERTS, 1):
        with Runner(store, Settings(find_policy("lru-spec"), slots=slots, streams=2)) as runner:
            texts.append(generate(runner, PROSE, Sampling(max_new_tokens=8)))
    assert texts[0] == texts[1]
