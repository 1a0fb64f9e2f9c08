"""Benches without weights: forced routing, random records, the released engine, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moepolicy import PolicySpec, find_policy
from moepolicy.library.gate.lru_spec import LruSpec
from moepolicy.steps import Step
from moeroute import open_trace
from moeroute.models import find_model
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.ondisk import write_store
from moerun.bench.random_weights import RandomRecords
from moerun.bench.routing import UNIFORM, ForcedRouting, load_routing
from moerun.bench.run import RELEASED, Bench
from moerun.bench.schedule import BenchSchedule
from moerun.bench.simulated import simulated_tokens_per_s
from moerun.checkpoint.families import count_experts, empty_model, find_experts
from moerun.errors import RunError
from moerun.kernels.slots import SlotForm
from moerun.settings import Settings
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.result import Result
from moesim.simulation import simulate
from moesim.workload.loading import load_workload
from support.shapes import gated_expert
from support.stores import verify

CPU = torch.device("cpu")
WARM_UP, TOKENS, SLOTS, ROUNDS = 5, 12, 3, 2


def tiny_model(precision: str = "fp32", seed: int = 0) -> GeneratedModel:
    return GeneratedModel(find_config("tiny"), name="tiny", precision=precision, seed=seed)


def tiny_routing(tokens: int = 1 + WARM_UP + TOKENS) -> ForcedRouting:
    return load_routing("tiny", layers=8, experts=8, top_k=2, tokens=tokens)


@pytest.fixture(scope="module")
def bench() -> Any:
    policies = tuple(find_policy(name) for name in ("lru", "lfu", "lru-spec"))
    schedule = BenchSchedule(policies, TOKENS, WARM_UP, ROUNDS, released=True)
    settings = Settings(policy=policies[0], slots=SLOTS)
    with Bench(tiny_model(), tiny_routing(), settings, schedule) as made:
        made.run()
        yield made


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_gates_decide_what_the_trace_says(bench: Bench, policy: str, tmp_path: Path) -> None:
    path = tmp_path / "forced.parquet"
    bench.routing.write_trace(path, bench.generated.index)
    workload = load_workload(open_trace(path))
    machine = Machine("any", "", "published", LinkProfile(1e9), Compute(layer_s=1e-3))

    def simulated(tokens: int) -> Result:
        some = workload.head(tokens)
        return simulate(some, find_policy(policy), machine, slots=SLOTS, expert_bytes=4096)

    warm, all_of_it = simulated(1 + WARM_UP), simulated(1 + WARM_UP + TOKENS)
    assert len(bench.results.runs[policy]) == ROUNDS
    for run in bench.results.runs[policy]:
        assert run.totals.requests == 2 * 8 * TOKENS
        assert run.totals.hits == all_of_it.hits - warm.hits
        assert run.totals.misses == all_of_it.misses - warm.misses
        assert run.bytes_moved == run.totals.loads * bench.store.record_bytes


def test_a_policy_sees_the_recorded_predictions(bench: Bench) -> None:
    """Layer by layer, what the trace says that this layer predicted of those ahead of it."""
    seen: list[tuple[int, Any]] = []

    class Watching(LruSpec):
        def prefetch(self, step: Step, keys: Any) -> int:
            seen.append((step.layer, step.predicted.copy()))
            return super().prefetch(step, keys)

    run = bench.run_policy(PolicySpec("watching", Watching))
    tokens, layers, _ = bench.routing.ids.shape
    experts = bench.routing.n_experts
    assert [layer for layer, _ in seen] == list(range(layers)) * tokens
    for number, (layer, predicted) in enumerate(seen):
        expected = np.full((len(predicted), experts), np.nan, np.float32)
        for ahead in range(1, min(len(predicted), layers - 1 - layer) + 1):
            expected[ahead - 1] = bench.routing.predicted[
                ahead - 1, number // layers, layer + ahead
            ]
        assert len(predicted) >= 1
        np.testing.assert_array_equal(predicted, expected)
    assert run.totals.prefetches > 0
    assert run.totals.requests == 2 * layers * TOKENS


def test_the_released_engine_writes_back_what_it_evicts(bench: Bench) -> None:
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(8)]
    hits = misses = evicted = 0
    for token, layers in enumerate(bench.routing.ids.tolist()):
        for layer, wanted in enumerate(layers):
            cache = held[layer]
            there = [expert for expert in wanted if expert in cache]
            for expert in there:
                cache.move_to_end(expert)
            measured = token > WARM_UP
            hits += measured * len(there)
            for expert in wanted:
                if expert not in there:
                    misses += measured
                    if len(cache) == SLOTS:
                        cache.popitem(last=False)
                        evicted += measured
                    cache[expert] = None
    assert evicted > 0
    assert len(bench.results.runs[RELEASED]) == ROUNDS
    for run in bench.results.runs[RELEASED]:
        assert (run.totals.hits, run.totals.misses) == (hits, misses)
        assert run.bytes_moved == (misses + evicted) * bench.store.record_bytes


@pytest.mark.parametrize("precision", ["native", "fp16", "4bit", "3bit", "2bit"])
def test_random_records_compute_finite_numbers(precision: str) -> None:
    shape = gated_expert(hidden=256, inner=512)
    records = RandomRecords(shape, precision, seed=3)
    form = SlotForm(shape, precision, CPU)
    outputs = []
    for key in (0, 1, 0):
        slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
        record = torch.zeros(form.record_bytes, dtype=torch.uint8)
        records.write(key, record)
        slot.arrive(record)
        x = torch.linspace(-1, 1, 256).view(1, -1).to(torch.bfloat16)
        outputs.append(slot.down(slot.up(x)[:, :512]).float())
    first, second, again = outputs
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # Weights of a spread of 0.02: twice through, from inputs of 0.58.
    expected = 0.58 * 0.02 * 256**0.5 * 0.02 * 512**0.5
    assert expected / 2 < float(first.std()) < expected * 2


def test_a_store_on_disk_is_whole_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = write_store(tiny_model("4bit"), folder)
    verify(store)
    assert store.index.precision == "4bit"
    store.close()
    written = (folder / "index.json").stat().st_mtime_ns
    write_store(tiny_model("4bit"), folder).close()
    assert (folder / "index.json").stat().st_mtime_ns == written
    with pytest.raises(RunError, match="random weights, seed 0"):
        write_store(tiny_model("4bit", seed=1), folder)


@pytest.mark.parametrize("shape", ["mixtral-8x22b", "gpt-oss-20b", "deepseek-v2-lite"])
def test_shapes_are_those_of_the_table(shape: str) -> None:
    """Whose weights are held against their names where the table is."""
    config, described = find_config(shape), find_model(shape)
    model = empty_model(config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == described.n_params
    layers = find_experts(model)
    assert (len(layers), count_experts(layers[0][1])) == (described.n_layers, described.n_experts)


def test_a_shape_of_a_family_that_is_not_offloaded_is_refused_by_its_family(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moerun.checkpoint.supported.SUPPORTED", ("mixtral",))
    with pytest.raises(RunError, match=r"'qwen3-next-80b-a3b' is of a 'qwen3_next' model"):
        find_config("qwen3-next-80b-a3b")


@pytest.mark.parametrize(
    ("experts", "tokens", "message"),
    [
        (16, 10, "top-2 of 8 experts, the shape of 8 layers, top-2 of 16"),
        (8, 10**7, "decoded tokens, and warm-up and --tokens ask for 10000000"),
    ],
)
def test_routing_of_another_shape_or_too_short(experts: int, tokens: int, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_routing("tiny", layers=8, experts=experts, top_k=2, tokens=tokens)


def test_uniform_routing_fits_any_shape() -> None:
    routing = load_routing(UNIFORM, layers=3, experts=32, top_k=4, tokens=200)
    assert routing.ids.shape == (200, 3, 4)
    assert routing.weights.sum(axis=2) == pytest.approx(1.0, abs=1e-3)
    assert all(len(set(row)) == 4 for row in routing.ids.reshape(-1, 4).tolist())
    assert routing.counts().sum() == 200 * 3 * 4


WITHOUT = """
import sys
for name in ("polars", "hqq", "simpy"):
    sys.modules[name] = None
from moerun.cli import main
main()
"""


def moerun(*arguments: str, without: bool = False) -> subprocess.CompletedProcess[str]:
    program = WITHOUT if without else "from moerun.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_command_needs_neither_polars_nor_hqq_nor_simpy(tmp_path: Path) -> None:
    config = find_config("mixtral-8x7b", layers=2)
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 32
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.save_pretrained(tmp_path / "small")
    done = moerun(
        *("--shape", str(tmp_path / "small" / "config.json"), "--precision", "2bit"),
        *("--tokens", "4", "--warm-up", "1", "--rounds", "1", "--baseline", "released"),
        *("--device", "cpu", "--format", "json"),
        without=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"] == "small"
    assert str(tmp_path) not in done.stdout
    assert len(found["routing_sha256"]) == 64
    assert [row["policy"].split()[0] for row in found["rows"]] == ["lru", "lru-spec", "released"]
    for row in found["rows"]:
        bound = max(row["link_s_per_token"], row["compute_s_per_token"])
        assert row["bound_s_per_token"] == bound
        assert row["over_bound"] == pytest.approx(1 / row["tokens_per_s"] / bound - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shape", "mixtral-8x8b"], 2, "did you mean 'mixtral-8x7b'"),
        (["--policy", "belady"], 1, "needs the future"),
        (["--direct"], 2, "--direct is about experts in files: give --store"),
        (["--machine", "t5"], 2, "unknown machine 't5'; did you mean 't4'?"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = moerun(*arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_numbers_out_of_range() -> None:
    with pytest.raises(RunError, match="layers must be 1 to 32, not 33"):
        find_config("mixtral-8x7b", layers=33)
    with pytest.raises(RunError, match="no precision '5bit'"):
        tiny_model("5bit")
    with pytest.raises(RunError, match="rounds must be 1 or more, not 0"):
        BenchSchedule((find_policy("lru"),), TOKENS, WARM_UP, 0, released=False).check()


def test_the_same_sample_without_polars(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"layers": 32, "experts": 8, "top_k": 2, "tokens": 2048}
    read = load_routing("mixtral-like", **shape)
    monkeypatch.setitem(sys.modules, "polars", None)
    assert load_routing("mixtral-like", **shape).sha256 == read.sha256
    with pytest.raises(RunError, match="needs polars"):
        load_routing("tiny", layers=8, experts=8, top_k=2, tokens=1)


@pytest.mark.slow
def test_the_simulator_is_asked_for_the_same_tokens(bench: Bench, tmp_path: Path) -> None:
    machine = tmp_path / "slow.toml"
    machine.write_text(
        'name = "slow"\nsource = "published"\ndescription = ""\n'
        "[link]\nbytes_per_s = 1e6\n[compute]\nlayer_s = 1e-6\n"
    )
    predicted = simulated_tokens_per_s(bench, machine)
    assert sorted(predicted) == ["lfu", "lru", "lru-spec"]
    for policy in ("lru", "lfu"):
        # Behind so slow a link the bytes are the time.
        moved = bench.results.runs[policy][0].bytes_moved
        assert predicted[policy] == pytest.approx(TOKENS / (moved / 1e6 + TOKENS * 8e-6), rel=0.01)
