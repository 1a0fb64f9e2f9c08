"""Live answers to misses: the simulator's decisions, the right weights, what must not differ."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from moepolicy import ExpertCache, Kind, PolicyError, find_policy, replay_journal
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live import assembly
from moerun.live import runner as runner_module
from moerun.live.passes import EventLog
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.cpu_experts import CpuExpert
from moerun.offload.experts import Served
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
from support.runs import ResidentProvider, generate
from transformers import AutoModelForCausalLM

OWN = Path(__file__).parents[2] / "support" / "policies.py"
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
a_machine = Machine(
    "m",
    "",
    "measured",
    LinkProfile(1e8, 1e-5, 2),
    Compute(1e-4, 1e-4, expert_s=1e-5),
    cpu=Cpu(1, 1e-4),
)


def always(answer: Kind) -> Any:
    """A policy with one answer to every miss."""
    return find_policy(f"{OWN}:AnswersLow:answer={int(answer)}")


@pytest.fixture(scope="module")
def stock() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, decoded: int = 6) -> torch.Tensor:
    """Of a prompt in one pass, then of single tokens after it."""
    n = ids.shape[1] - decoded
    out = model(ids[:, :n], use_cache=True)
    found = [out.logits]
    for i in range(n, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


def run_logits(store: ExpertStore, settings: Settings) -> torch.Tensor:
    with Runner(store, settings) as runner:
        return logits_of(runner.model, runner.encode(PROSE))


def shuffled(seed: int) -> Any:
    """Stands for make_link: copies under way, two at a time, end in random order."""

    def make(store: ExpertStore, form: Any, chosen: Settings, n_slots: int) -> ShuffledLink:
        slots = assembly.make_slots(form, chosen, n_slots)
        return ShuffledLink(store, slots, 2, seed, chosen.low)

    return patch.object(runner_module, "make_link", make)


def record(runner: Runner, folder: Path) -> dict[str, Any]:
    recording = LiveRecording(runner, folder / "t.parquet", folder / "j.json", seed=0)
    for text in (PROSE, "def main(arguments):\n    for name in"):
        recording.recorder.begin_sequence()
        runner.generation().run(runner.encode(text), Sampling(max_new_tokens=8))
    recording.finish()
    document: dict[str, Any] = json.loads((folder / "j.json").read_text())
    return document


@pytest.mark.parametrize(("scope", "link"), [("layer", "shuffled"), ("global", "disk")])
@pytest.mark.parametrize(
    "policy", ["fiddler", "hobbit", "adapmoe-skip", "emoe-substitute", f"{OWN}:Anything"]
)
def test_the_simulator_repeats_the_run_event_for_event(
    stores: dict[str, ExpertStore], tmp_path: Path, policy: str, scope: str, link: str
) -> None:
    """Property 1, and the same account of what was changed."""
    low = stores["2bit"]
    chosen = Settings(find_policy(policy), slots=3, scope=scope, streams=2, low=low)
    links = shuffled(5) if link == "shuffled" else nullcontext()
    with links, Runner(stores["native"], chosen) as runner:
        document = record(runner, tmp_path)
        totals, context, live = runner.session.totals, runner.context, runner.session.cache.arrays
        runner.session.cache.check()
    trace = open_trace(tmp_path / "t.parquet")
    sizes = sizes_of(trace.meta, stores["native"].record_bytes, low.record_bytes)
    workload = load_workload(trace, logits=True)
    log = EventLog()
    cache, _ = simulate(
        workload,
        chosen.policy,
        context,
        costs_of(workload, a_machine, sizes, predicting=False),
        compilations=Compilations(),
        observers=(log,),
    )
    assert [tuple(event) for event in log.events] == [tuple(e) for e in document["events"]]
    assert cache.mass.tolist() == live.mass.tolist()
    answers = totals.cpu_experts, totals.low_loads, totals.substituted, totals.skipped
    assert any(answers)
    assert totals.bytes_loaded == (
        (totals.loads - totals.low_loads) * stores["native"].record_bytes
        + totals.low_loads * low.record_bytes
    )


def test_the_journal_repeats_a_run_that_also_prefetches(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    """Property 2."""
    chosen = Settings(find_policy(f"{OWN}:AnythingStaged"), slots=2, streams=2, low=stores["2bit"])
    with shuffled(9), Runner(stores["native"], chosen) as runner:
        document = record(runner, tmp_path)
        context = runner.context
    log = EventLog()
    cache = ExpertCache(context, chosen.policy.build(context), observers=[log])
    workload = load_workload(open_trace(tmp_path / "t.parquet"))
    steps = map(workload.step, range(workload.n_steps))
    replay_journal(cache, steps, [tuple(call) for call in document["calls"]])
    assert [tuple(event) for event in log.events] == [tuple(e) for e in document["events"]]
    happened = {event.kind for event in log.events}
    assert {Kind.COMPUTE, Kind.SKIP, Kind.LOW, Kind.SUBSTITUTE, Kind.SPECULATE} <= happened


class Checked:
    """Stands between model and session, and holds what is served against the whole model."""

    def __init__(self, runner: Runner, full: ResidentProvider, low: ResidentProvider) -> None:
        self.experts, self.session = runner.experts, runner.session
        self.full, self.low = full, low
        self.served: set[str] = set()

    def serve(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> Served:
        served = self.experts.serve(layer, ids, weights)
        return Served(served.ids, self._checked(layer, served))

    def _checked(self, layer: int, served: Served) -> Generator[Any, None, None]:
        cache = self.session.cache
        for expert, found in served:
            if found is not None and not isinstance(found, CpuExpert):
                arrays = cache.arrays
                wanted = arrays.wanted[: arrays.n_demand[0]].tolist()
                key = layer * self.session.context.n_experts + expert
                substitute = cache.substitute(wanted.index(key))
                who = substitute if substitute >= 0 else key
                low = cache.is_low(who)
                self.served.add(f"{'substitute' if substitute >= 0 else 'own'} {low}")
                self.same(found, (self.low if low else self.full).slots[who])
            yield expert, found

    def same(self, found: Any, expected: Any) -> None:
        x = torch.linspace(-1, 1, 2 * 128).view(2, 128)
        h = found.up(x)
        assert torch.equal(h, expected.up(x))
        half = h[:, : h.shape[1] // 2].contiguous()
        assert torch.equal(found.down(half), expected.down(half))


@pytest.mark.parametrize("full", ["native", "4bit"])
def test_every_slot_holds_what_it_is_said_to_hold(
    stores: dict[str, ExpertStore], full: str
) -> None:
    settings = Settings(find_policy(f"{OWN}:Anything:seed=4"), slots=3, low=stores["2bit"])
    with shuffled(3), Runner(stores[full], settings) as runner:
        checked = Checked(runner, ResidentProvider(stores[full]), ResidentProvider(stores["2bit"]))
        for module in runner.model.modules():
            if hasattr(module, "offload"):
                module.offload = replace(module.offload, provider=checked)
        runner.generation().run(runner.encode(PROSE), Sampling(max_new_tokens=16))
    assert checked.served == {"own True", "own False", "substitute True", "substitute False"}


@pytest.mark.parametrize("precision", ["native", "4bit", "2bit"])
def test_experts_computed_on_the_cpu_give_the_same_bits(
    stores: dict[str, ExpertStore], stock: Any, precision: str
) -> None:
    store = stores[precision]
    expected = run_logits(store, Settings(find_policy("lru"), slots=8))
    with Runner(store, Settings(always(Kind.COMPUTE), slots=2, low=stores["2bit"])) as runner:
        ids = runner.encode(PROSE)
        assert torch.equal(logits_of(runner.model, ids), expected)
        totals = runner.session.totals
        assert totals.cpu_experts == totals.requests > 0
    if precision == "native":
        assert torch.equal(expected, logits_of(stock, ids))


def test_answering_in_turns_where_nothing_may_change_changes_nothing(
    stores: dict[str, ExpertStore], stock: Any
) -> None:
    """Fiddler runs some misses on the CPU and loads others, and one-token steps mix both."""
    with Runner(stores["native"], Settings(find_policy("fiddler:tokens=1"), slots=3)) as runner:
        ids = runner.encode(PROSE)
        assert torch.equal(logits_of(runner.model, ids), logits_of(stock, ids))
        totals = runner.session.totals
        assert min(totals.cpu_experts, totals.loads, totals.hits) > 0
        assert totals.gate_mass > 0
        assert not any(totals.shares.values())


@pytest.mark.parametrize("family", ["gpt_oss", "minimax_m2"])
def test_other_families_compute_on_the_cpu_too(family: str, tmp_path: Path) -> None:
    source = save_checkpoint(random_model(family), resolve("tiny"), tmp_path / "model")
    store = pack(source, tmp_path / "store")
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(1, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    with Runner(store, Settings(always(Kind.COMPUTE), slots=2, low=store)) as runner:
        assert torch.equal(logits_of(runner.model, ids), logits_of(stock, ids))
        assert runner.session.totals.cpu_experts > 0


def test_everything_at_the_lower_precision_is_the_lower_store(
    stores: dict[str, ExpertStore],
) -> None:
    expected = run_logits(stores["2bit"], Settings(find_policy("lru"), slots=8))
    for slots in (2, 8):
        chosen = Settings(always(Kind.LOW), slots=slots, low=stores["2bit"])
        assert torch.equal(run_logits(stores["native"], chosen), expected)


def test_without_any_expert_the_layers_add_nothing(stores: dict[str, ExpertStore]) -> None:
    with Runner(stores["native"], Settings(always(Kind.SKIP), low=stores["2bit"])) as runner:
        ids = runner.encode(PROSE)
        found = logits_of(runner.model, ids)
        totals = runner.session.totals
        assert (totals.skipped, totals.loads) == (totals.requests, 0)
        assert totals.shares["skipped_share"] == 1
        for module in runner.model.modules():
            if hasattr(module, "offload"):
                module.register_forward_hook(lambda _m, _x, y: torch.zeros_like(y))
        assert torch.equal(found, logits_of(runner.model, ids))


def test_a_record_that_cannot_be_computed_on_the_cpu_is_named(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    store = pack(resolve("tiny"), tmp_path / "store")
    where = store.location(5)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 100)
        file.write(b"\xff\x00\xff\x00")
    chosen = Settings(always(Kind.COMPUTE), low=stores["2bit"])
    with Runner(ExpertStore.open(store.path), chosen) as runner:
        with pytest.raises(RunError, match=rf"expert 5 of layer 0 .*{where.path.name}"):
            generate(runner, PROSE, Sampling(max_new_tokens=2))
        with pytest.raises(RunError, match="expert 5 of layer 0"):
            generate(runner, PROSE, Sampling(max_new_tokens=2))
        runner.session.reset()
        ids = torch.tensor([[1]]), torch.ones(1, 1)
        assert [expert for expert, _ in runner.session.serve(0, *ids)] == [1]
    assert not [t for t in threading.enumerate() if t.name.startswith("cpu-experts")]


def test_a_slot_is_as_big_as_the_bigger_form(stores: dict[str, ExpertStore]) -> None:
    small, big = stores["2bit"], stores["native"]
    for store, low in ((big, small), (small, big)):
        with Runner(store, Settings(find_policy("lru"), slots=2, low=low)) as runner:
            assert runner.plan.slot_bytes >= max(small.record_bytes, big.record_bytes)
            assert runner.arena_bytes == runner.session.cache.n_slots * runner.plan.slot_bytes
    with Runner(small, Settings(find_policy("lru"), slots=0, low=big)) as runner:
        budget = runner.plan.least_bytes + 3 * small.n_layers * runner.plan.slot_bytes
    with Runner(small, Settings(find_policy("lru"), memory_bytes=budget, low=big)) as runner:
        assert runner.context.slots == 3
        assert runner.plan.total_bytes <= budget


def test_what_cannot_be_answered_is_refused_before_it_runs(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    store = stores["native"]
    with pytest.raises(PolicyError, match=r"'hobbit' loads experts at a lower precision.*--low"):
        Runner(store, Settings(find_policy("hobbit")))
    source = save_checkpoint(random_model("mixtral"), resolve("tiny"), tmp_path / "model")
    other = pack(source, tmp_path / "store")
    with pytest.raises(RunError, match="is the store of another model"):
        Runner(store, Settings(find_policy("hobbit"), low=other))
