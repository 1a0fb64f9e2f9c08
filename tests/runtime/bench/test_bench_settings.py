"""Benches of all that `moerun` serves: budgets, packed attention, pieces, answers to misses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import Kind, PolicyError, find_policy
from moeroute import open_trace
from moerun.bench import fit, report
from moerun.bench.fit import BenchMemory, refuse_too_big
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.ondisk import write_store
from moerun.bench.report import rows_of
from moerun.bench.routing import load_routing
from moerun.bench.run import RELEASED, Bench
from moerun.bench.schedule import BenchSchedule
from moerun.errors import RunError
from moerun.memory.compiling import Compiling
from moerun.memory.fit import plan_memory
from moerun.offload.attention import PackedLinear
from moerun.settings import Settings
from moesim.machine.profile import Compute, Cpu, LinkProfile, Machine
from moesim.result import Result
from moesim.simulation import simulate
from moesim.workload.loading import load_workload
from support.big_models import SIZES
from support.commands import Call, caller
from support.stores import verify

CPU = torch.device("cpu")
OWN = Path(__file__).parents[2] / "support" / "policies.py"
ON_CPU = f"{OWN}:AnswersLow:answer={int(Kind.COMPUTE)}"
WARM_UP, TOKENS = 4, 10
MIB = 1 << 20


def make_bench(*policies: str, **options: Any) -> Bench:
    """Of the bundled model's shape: what is not a Bench's own option is a setting's."""
    own = {name: options.pop(name) for name in ("low", "folder") if name in options}
    attention, released = options.pop("attention", "native"), options.pop("released", False)
    specs = tuple(find_policy(policy) for policy in policies)
    bench = Bench(
        GeneratedModel(
            find_config("tiny"), name="tiny", precision="4bit", seed=0, attention=attention
        ),
        load_routing("tiny", layers=8, experts=8, top_k=2, tokens=1 + WARM_UP + TOKENS),
        Settings(specs[0], **options),
        BenchSchedule(specs, TOKENS, WARM_UP, 1, released),
        **own,
    )
    # Compiled or not, the decisions are the same, and compiling takes seconds.
    bench.memory = replace(bench.memory, compiling=Compiling.NEVER)
    return bench


def test_policies_answer_misses_as_the_simulator_has_them(tmp_path: Path) -> None:
    policies = ("hobbit", "adapmoe-skip", "emoe-substitute", ON_CPU)
    with make_bench(*policies, low="2bit", slots=3, released=True) as bench:
        bench.run()
        bench.routing.write_trace(tmp_path / "t.parquet", bench.generated.index)
        rows = {row.policy: row for row in report.rows_of(bench, {})}
        sizes = bench.store.record_bytes, bench.low.record_bytes if bench.low else 0
        compute_s = bench.results.compute[0].decode_s / TOKENS
        rest_s = bench.results.without_experts[0].decode_s / TOKENS
    workload = load_workload(open_trace(tmp_path / "t.parquet"), logits=True)
    machine = Machine(
        "m", "", "published", LinkProfile(1e9), Compute(layer_s=1e-3), cpu=Cpu(1, 1e-4)
    )

    def simulated(policy: str, tokens: int) -> Result:
        some, spec = workload.head(tokens), find_policy(policy)
        given: dict[str, Any] = {"expert_bytes": sizes[0], "low_bytes": sizes[1]}
        return simulate(some, spec, machine, limits=False, slots=3, **given)

    for policy in policies:
        (run,) = bench.results.runs[policy]
        cold, all_of_it = (simulated(policy, 1 + n) for n in (WARM_UP, WARM_UP + TOKENS))
        for name in ("hits", "misses", "low_loads", "cpu_experts", "substituted", "skipped"):
            found, warm = getattr(all_of_it, name), getattr(cold, name)
            assert getattr(run.totals, name) == found - warm, (policy, name)
        full = run.totals.loads - run.totals.low_loads
        assert run.bytes_moved == full * sizes[0] + run.totals.low_loads * sizes[1]
        assert rows[policy].lossy
    assert bench.results.runs["hobbit"][0].totals.low_loads > 0
    assert rows["hobbit"].low_share > 0
    assert not rows["released (model of mixtral-offloading)"].lossy
    # Experts that the device has not computed are not in the bound.
    on_cpu = rows[ON_CPU]
    assert on_cpu.cpu_ratio > 0
    expected = compute_s - on_cpu.cpu_ratio * (compute_s - min(rest_s, compute_s))
    assert on_cpu.compute_s_per_token == pytest.approx(expected)
    assert rows["emoe-substitute"].compute_s_per_token == pytest.approx(compute_s)
    table = report.table_of(list(rows.values()), report.provenance(bench))
    notes = " ".join(table.split())  # they are wrapped
    assert re.search(r" hobbit\*: changes what the model computes: [^:]* lower precision ", notes)


def test_policies_that_count_experts_compute_on_the_cpu() -> None:
    with make_bench("fiddler", "static", slots=2) as bench:
        bench.run()
        runs = bench.results.runs
        fiddler, static = runs["fiddler"][0].totals, runs["static"][0].totals
    assert fiddler.cpu_experts > 0
    assert static.cpu_experts == 0
    # Static keeps the most used of this very routing.
    kept = bench.routing.counts().argsort(axis=1, kind="stable")[:, -2:]
    assert static.hits >= 0.5 * sum(
        int((bench.routing.ids[1 + WARM_UP :, layer] == key).sum())
        for layer, keys in enumerate(kept.tolist())
        for key in keys
    )


def test_pieces_change_no_decision() -> None:
    runs = []
    for options in ({}, {"chunk_bytes": 4096, "streams": 2}):
        with make_bench("lru", slots=2, **options) as bench:
            bench.run()
            runs.append(bench.results.runs["lru"][0])
            assert bench._link.chunked == bool(options)
    one, other = (replace(run.totals, stall_s=0, decide_s=0) for run in runs)
    assert one == other


@pytest.mark.slow
def test_attention_is_computed_packed_from_memory_and_from_files(tmp_path: Path) -> None:
    tokens, planned = [], []
    for folder in (None, tmp_path / "store", tmp_path / "store"):
        with make_bench("lru", slots=2, attention="4bit", folder=folder) as bench:
            bench.run()
            packed = [m for m in bench.model.modules() if isinstance(m, PackedLinear)]
            assert len(packed) == 4 * 8
            outputs = packed[0](torch.ones(1, packed[0].in_features))
            tokens.append((bench.last_ids, outputs.tolist()))
            planned.append(bench.memory.needs.weights_bytes)
            if folder:
                verify(bench.store)
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(planned)) == 1
    with make_bench("lru", slots=2) as bench:
        assert bench.memory.needs.weights_bytes > planned[0]
    with pytest.raises(RunError, match="attention in 4bit"):
        make_bench("lru", slots=2, folder=tmp_path / "store")


@pytest.mark.slow
def test_the_lower_precision_lies_beside_the_other_on_disk(tmp_path: Path) -> None:
    options = {"low": "2bit", "slots": 2, "folder": tmp_path / "store", "cold": True}
    for _ in range(2):  # made, then found
        with make_bench("hobbit", host_bytes=MIB, **options) as bench:
            bench.run()
            assert bench.low is not None
            assert bench.low.path == tmp_path / "store" / "low-2bit"
            assert bench.low.index.precision == "2bit"
            assert bench.results.runs["hobbit"][0].totals.low_loads > 0
            assert bench.memory.needs.host_tier_bytes == MIB
            (row,) = rows_of(bench, {})
            # Some records come from memory, some from disk: that has no one rate to be bound by.
            assert row.link_s_per_token is None
            assert row.bound_s_per_token == row.compute_s_per_token


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"low": "2bit"}])
def test_slots_are_those_that_moerun_would_plan(tmp_path: Path, options: dict[str, Any]) -> None:
    with make_bench("lru", slots=0, **options) as bench:
        least = bench.memory.least_bytes
        row = bench.memory.n_layers * bench.memory.slot_bytes
    budget = least + 3 * row + 1000
    with make_bench("lru", "static", memory_bytes=budget, **options) as bench:
        bench.run()
        assert bench.slots == 3
        assert bench.results.runs["lru"][0].totals.hits > 0
        model = bench.generated
        stores = [write_store(model, tmp_path / "store")]
        if options:
            stores.append(write_store(model.at("2bit"), tmp_path / "low"))
    settings = Settings(
        find_policy("lru"),
        memory_bytes=budget,
        context_tokens=2 + WARM_UP + TOKENS,
        prompt_tokens=1,
        low=stores[1] if options else None,
    )
    assert plan_memory(stores[0], settings) == bench.memory
    # All policies of a bench fit.
    with make_bench("lru", "lru-spec", memory_bytes=budget, **options) as bench:
        assert (bench.memory.staging, bench.slots) == (4, 2)
    with pytest.raises(RunError, match=r"least that works is \d+MiB \(weights"):
        make_bench("lru", memory_bytes=least - MIB, **options)


def test_what_cannot_run_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Bench, "_make", None)  # not to be reached
    with pytest.raises(PolicyError, match="'hobbit' loads experts at a lower precision"):
        make_bench("hobbit", slots=2)
    with pytest.raises(RunError, match="needs 1 slot a layer or more"):
        make_bench("lru", slots=0, released=True)
    with pytest.raises(RunError, match="slots must be 0 or more, not -1"):
        make_bench("lru", slots=-1)
    monkeypatch.setattr(fit, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(RunError, match=r"free: give --layers|lower --precision"):
        make_bench("lru", slots=8)


MIXTRAL = BenchMemory(
    expert_bytes=17 * 10**9,
    slot_bytes=16 * 10**9,
    dense_bytes=32 * 10**8,
    staging_bytes=5 * 10**8,
    n_layers=32,
    layer_bytes=84 * 10**6,
)


def test_what_is_too_big_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 24 * 10**9
    monkeypatch.setattr(fit, "free_bytes", lambda _: free)
    with pytest.raises(RunError) as caught:
        refuse_too_big(MIXTRAL, CPU, on_disk=False)
    said = str(caught.value)
    assert "needs 37.77 GB of this machine's memory (experts 17.00 GB, slots 16.50 GB" in said
    assert "24.00 GB are free" in said
    assert "--store FOLDER" in said
    (layers,) = re.findall(r"--layers (\d+) or fewer", said)
    refuse_too_big(MIXTRAL.of_layers(int(layers)), CPU, on_disk=False)
    with pytest.raises(RunError, match=f"--layers {layers} or fewer"):
        refuse_too_big(MIXTRAL.of_layers(int(layers) + 1), CPU, on_disk=False)
    refuse_too_big(MIXTRAL, CPU, on_disk=True)
    free = 12 * 10**9
    with pytest.raises(RunError) as caught:  # files alone would not do
        refuse_too_big(MIXTRAL, CPU, on_disk=False)
    assert "--store" not in str(caught.value)
    with pytest.raises(RunError, match="fewer --slots"):
        refuse_too_big(MIXTRAL, CPU, on_disk=True)


def test_a_budget_has_as_many_slots_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_bytes", lambda _: 24 * 10**9)
    budgeted = replace(MIXTRAL, all_slot_bytes=32 * 10**9)
    few = budgeted.of_layers(8)
    assert few.slot_bytes == 8 * 10**9  # for all of their experts
    assert budgeted.of_layers(30).slot_bytes == 16 * 10**9 + 2 * MIXTRAL.layer_bytes
    with pytest.raises(RunError, match="less --memory") as caught:
        refuse_too_big(budgeted, CPU, on_disk=False)
    (layers,) = re.findall(r"--layers (\d+) or fewer", str(caught.value))
    refuse_too_big(budgeted.of_layers(int(layers)), CPU, on_disk=False)


def test_a_gpu_and_its_host_are_asked_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    free = {"cpu": 64 * 10**9, "cuda": 16 * 10**9}
    monkeypatch.setattr(fit, "free_bytes", lambda device: free[device.type])
    with pytest.raises(RunError, match=r"20\.77 GB of cuda:0 .*fewer --slots"):
        refuse_too_big(MIXTRAL, gpu, on_disk=False)
    free |= {"cpu": 8 * 10**9, "cuda": 24 * 10**9}
    with pytest.raises(RunError, match=r"17\.00 GB of this machine's memory .*--layers 15 or"):
        refuse_too_big(
            MIXTRAL, gpu, on_disk=True
        )  # its link keeps them in host memory all the same
    refuse_too_big(replace(MIXTRAL, tier_bytes=4 * 10**9), gpu, on_disk=True)


QUICK = (
    *("bench", "--shape", "tiny", "--routing", "tiny", "--precision", "4bit", "--threads", "1"),
    *("--tokens", "4", "--warm-up", "1", "--rounds", "1", "--device", "cpu"),
)


@pytest.fixture
def moerun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, *QUICK)


def test_the_command_plans_a_budget_and_names_the_smallest(moerun: Any) -> None:
    chosen = ("--attention", "4bit", "--low", "2bit", "--chunk", "16KiB")
    policies = ("--policy", "lru", "--policy", "hobbit", "--policy", "fiddler")
    code, out, err = moerun("--memory", "1MiB", *chosen, *policies)
    assert (code, out) == (1, "")
    (least,) = re.findall(r"the least that works is (\d+)MiB \(.*CPU experts", err)
    budget = ("--memory", f"{int(least) + 2}MiB")
    code, out, err = moerun(*budget, *chosen, *policies, "--format", "json")
    assert code == 0, err
    assert re.search(r"^slots +[\d.]+ [KM]iB  [1-7] of 8 experts in each of 8 layers", err, re.M)
    found = json.loads(out)
    assert found["memory"]["slots"] == found["slots"] < 8
    assert found["memory"]["total_bytes"] <= found["memory"]["budget_bytes"]
    assert (found["attention"], found["low"], found["chunk_bytes"]) == ("4bit", "2bit", 16384)
    rows = {row["policy"]: row for row in found["rows"]}
    assert [rows[name]["lossy"] for name in ("lru", "hobbit", "fiddler")] == [False, True, False]
    assert rows["fiddler"]["cpu_ratio"] > 0
    assert RELEASED not in rows


@pytest.mark.slow
def test_a_bench_keeps_to_its_budget(tmp_path: Path) -> None:
    config = find_config("mixtral-8x7b", layers=4)
    config.update(SIZES | {"num_key_value_heads": 8})
    config.save_pretrained(tmp_path / "small")
    budget = 150
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from moerun.cli import main; main()", "bench"),
            *("--shape", str(tmp_path / "small"), "--store", str(tmp_path / "store")),
            *("--precision", "bf16", "--memory", f"{budget}MiB", "--policy", "lru"),
            *("--baseline", "released", "--tokens", "6", "--warm-up", "2", "--rounds", "1"),
            *("--device", "cpu", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["slots"] < 8
    assert 0.5 * found["memory"]["total_bytes"] < found["memory_peak_bytes"] <= budget * MIB


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--memory", "1GiB", "--slots", "2"], 2, "give --slots or --memory, not both"),
        (["--host-memory", "1GiB"], 2, "--host-memory is about experts in files: give --store"),
        (["--policy", "hobbit"], 1, "give --low"),
        (["--low", "5bit"], 2, "--low 5bit: did you mean '4bit'?"),
        (["--attention", "1bit"], 2, "attention cannot be '1bit'"),
    ],
)
def test_bad_input_is_one_line(moerun: Any, arguments: list[str], code: int, message: str) -> None:
    found, out, err = moerun(*arguments)
    assert (found, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())
