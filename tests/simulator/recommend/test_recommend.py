"""`moesim recommend`: the choice follows the simulations, fits the memory, and runs."""

from __future__ import annotations

import json
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import moesim
import moesim.cli
import numpy as np
import pytest
from moepolicy import find_policy
from moeroute import TraceError, open_trace
from moeroute.models import describe, find_model, published
from moeroute.statistics import locality, read_routing, recall
from moesim import SimulationError
from moesim.recommend import hardware
from moesim.recommend.budget import Budget, cache_bytes, dense_bytes
from moesim.recommend.hardware import find_here, on_disk
from moesim.recommend.model import find_wanted
from moesim.recommend.routing import locality_of, write_routing
from moesim.simulation import workload_for


def recommend(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moesim", "recommend", *arguments])
        with pytest.raises(SystemExit) as left:
            moesim.cli.main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is recommended for the sample of the bundled model, as JSON."""
    folder = tmp_path_factory.mktemp("recommended")
    out, config = folder / "r.json", folder / "r.toml"
    options = ["--machine", "cpu-disk", "--memory", "55MiB", "--precision", "fp16"]
    assert recommend("tiny", *options, "--out", str(out), "--config", str(config)) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"toml": tomllib.loads(config.read_text())}


def test_the_prediction_is_a_simulation_of_the_choice(tiny: dict[str, Any]) -> None:
    frame = moesim.compare(
        "tiny",
        [tiny["options"]["policy"]],
        slots=tiny["slots"],
        machine="cpu-disk",
        precision="fp16",
        tokens=256,
    )
    assert frame["tokens_per_s"][0] == tiny["tokens_per_s"]
    assert frame["limit_tokens_per_s"][0] == tiny["limit_tokens_per_s"] >= tiny["tokens_per_s"]


def test_no_step_makes_it_slower(tiny: dict[str, Any]) -> None:
    steps = tiny["steps"]
    assert [step["step"] for step in steps] == [
        "precision",
        "attention",
        "policy",
        "prefetch depth",
        "scope",
    ]
    assert all(step["gain"] >= 0 for step in steps)
    speeds = [step["tokens_per_s"] for step in steps]
    assert speeds == sorted(speeds)
    assert speeds[-1] == tiny["tokens_per_s"]


def test_what_prefetching_is_worth_is_found(tiny: dict[str, Any]) -> None:
    """With few slots and a slow disk the gates' guesses pay on the bundled model's routing."""
    [step] = [step for step in tiny["steps"] if step["step"] == "prefetch depth"]
    assert step["chosen"] != "none"
    policy = find_policy(tiny["options"]["policy"])
    assert "predictions" in policy.requires or policy.name == "foresight-ahead"


def test_layers_share_a_cache_where_that_is_faster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Six of eight slots: some layers of the bundled model use fewer experts than others."""
    config = tmp_path / "r.toml"
    options = ["--machine", "cpu-disk", "--memory", "60MiB", "--precision", "fp16"]
    assert recommend("tiny", *options, "--format", "json", "--config", str(config)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"][-1]["step"], found["steps"][-1]["chosen"]) == ("scope", "global")
    assert found["steps"][-1]["gain"] > 0.01
    assert "--scope global" in found["line"]
    assert tomllib.loads(config.read_text())["scope"] == "global"


def test_a_prompt_is_read_in_pieces_where_only_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """gpt-oss holds the scores of a whole prompt: 13 GB at 4,096 tokens."""
    options = ["--machine", "rtx3060", "--policy", "lru", "--format", "json"]
    assert recommend("gpt-oss-20b", *options, "--memory", "11GiB") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["step"] == "prompt chunk"
    assert found["options"]["prompt-chunk"] == 512
    assert "--prompt-chunk 512" in found["line"]
    assert recommend("gpt-oss-20b", *options, "--memory", "11GiB", "--context", "512") == 0
    assert "prompt-chunk" not in json.loads(capsys.readouterr().out)["options"]


def test_slots_of_a_cpu_have_what_its_libraries_leave() -> None:
    """104 MiB hold the bundled model's experts whole, as moerun plans there: 8 of 8."""
    for device, slots in (("gpu", 4), ("cpu", 8)):
        budget = Budget(104 << 20, None, None, device)
        workload = workload_for(open_trace("tiny"), []).head(10)
        meta = open_trace("tiny").meta
        dense = dense_bytes(None, meta, "native")
        assert meta.expert_bytes is not None
        size = meta.expert_bytes["fp16"]
        assert budget.slots(workload, find_policy("lru"), size, dense) == slots


def test_the_file_and_the_line_say_the_same(tiny: dict[str, Any]) -> None:
    assert tiny["toml"] == tiny["options"]
    for name, value in tiny["toml"].items():
        assert f"--{name} " in tiny["line"]
        assert str(value) in tiny["line"]


def test_the_machine_is_said_to_a_policy_that_welcomes_its_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, line in (("foresight-spec", "--machine t4 "), ("lru", None)):
        file = tmp_path / f"{name}.toml"
        options = ["--machine", "t4", "--memory", "16GiB", "--policy", name, "--format", "json"]
        assert recommend("tiny", *options, "--config", str(file)) == 0
        found = json.loads(capsys.readouterr().out)
        assert ("--machine" in found["line"]) == (line is not None)
        assert line is None or line in found["line"]
        assert tomllib.loads(file.read_text()).get("machine") == ("t4" if line else None)


def test_what_is_run_and_what_it_rests_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert recommend("mixtral-8x7b", "--machine", "t4", "--policy", "foresight-spec") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "tokens/s under foresight-spec, with about" in told
    assert "rests on generated predictions" in told
    assert recommend("tiny", "--machine", "t4", "--policy", "foresight-spec") == 0
    told = capsys.readouterr().out
    assert "generated predictions" not in told
    assert "tokens of context" not in told  # a trace does not say how big keys and values are
    assert "--context" not in told


def test_no_more_context_than_the_model_has(tmp_path: Path) -> None:
    wanted = find_wanted("olmoe-1b-7b", None, tmp_path)
    assert wanted.shape is not None
    assert wanted.shape.context_tokens == 4096
    assert wanted.context(None) == (4096, "")
    assert wanted.context(100) == (100, "")
    assert wanted.context(9000) == (4096, "context: 9,000 tokens are more than the model's 4,096")
    assert find_wanted("tiny", None, tmp_path).context(None)[0] is None


@pytest.mark.parametrize("name", ["gpt-oss-20b", "mixtral-8x7b", "deepseek-v2-lite"])
def test_positions_are_those_after_stretching(name: str) -> None:
    longest = {"gpt-oss-20b": 131072, "mixtral-8x7b": 32768, "deepseek-v2-lite": 163840}
    assert find_model(name).context_tokens == longest[name]
    config = published()[name] | {
        "max_position_embeddings": 4096,
        "rope_scaling": {"original_max_position_embeddings": 4096, "factor": 16.0},
    }
    assert describe(config, name).context_tokens == 65536


def test_more_bits_are_kept_where_fewer_gain_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert recommend("tiny", "--machine", "cpu-disk", "--memory", "2GiB", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots"] == 8
    assert found["steps"][0]["chosen"] in ("fp16", "4bit")
    assert found["others"]


def test_a_model_without_a_trace_gets_generated_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--machine", "rtx3060", "--policy", "lru", "--format", "json"]
    assert recommend("allenai/OLMoE-1B-7B-0924", *options, "--memory", "6GiB") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["how_sure"].startswith("synthetic")
    assert found["options"]["model"] == "allenai/OLMoE-1B-7B-0924"
    shape = find_model("olmoe-1b-7b")
    precision = found["options"].get("precision", "bf16")
    attention = found["options"].get("attention", "native")
    held = 16 * found["slots"] * shape.expert_bytes()[precision]
    held += dense_bytes(shape, open_trace("tiny").meta, attention) + cache_bytes(shape, 4096)
    assert held < 6 * 2**30


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["mixtral-8x7b", "--machine", "rtx3060", "--memory", "1GiB"], 1, "give more --memory"),
        (["nobody/nothing", "--machine", "t4"], 1, "nothing is known here"),
        (["mixtral-8x7b", "--machine", "cpu-disk"], 2, "give --memory"),
        (["mixtral-8x7b", "--machine", "t4", "--trace", "tiny"], 1, "is not like mixtral-8x7b"),
        (["mixtral-8x7b", "--machine", "t4", "--precision", "5bit"], 1, "no size for precision"),
        (["tiny", "--machine", "t4", "--config", "x.yaml"], 2, "suffix"),
        (["tiny", "--machine", "t4", "--memory", "40GiB"], 2, "more than the 16.00 GiB of t4"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recommend(*arguments) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b", "olmoe-1b-7b"])
def test_generated_routing_is_as_local_as_published(name: str, tmp_path: Path) -> None:
    shape = find_model(name).first(6)
    trace = write_routing(tmp_path / "t.parquet", shape, tokens=600)
    found = float(locality(read_routing(trace)).mean[0])
    assert found == pytest.approx(locality_of(shape.n_experts, shape.top_k), abs=0.03)
    ahead = recall(trace, [shape.top_k]).mean[:, 0]
    assert 1 > ahead[0] > ahead[1] > ahead[2] > 0.5
    assert trace.meta.source == "synthetic"


def test_published_locality() -> None:
    assert locality_of(8, 2) == pytest.approx(0.376, abs=0.001)
    assert locality_of(32, 4) == pytest.approx(0.446, abs=0.001)
    assert locality_of(128, 6) == pytest.approx(0.380, abs=0.001)


def test_slots_are_what_memory_leaves() -> None:
    workload = workload_for(open_trace("mixtral-like"), []).head(10)
    lru = find_policy("lru")
    budget = Budget(8 * 10**8 + (96 << 20) - 10**8, None, None)
    # 6e8 for a staging buffer and slots of 32 layers, 5e6 each
    assert budget.slots(workload, lru, 5 * 10**6, 10**8) == (6 * 10**8 // (5 * 10**6) - 1) // 32
    assert budget.slots(workload, lru, 10**4, 10**8) == 8
    assert budget.slots(workload, lru, 5 * 10**6, 7 * 10**8) is None


def test_a_checkpoint_in_the_hub_s_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TraceError, match="nothing is known here"):
        find_wanted("someone/small", None, tmp_path)
    folder = tmp_path / "models--someone--small" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    config = {"model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32, "dtype": "float16"}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 16}
    config |= {"num_experts_per_tok": 4, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    found = find_wanted("someone/small", None, tmp_path)
    assert found.run_as == "someone/small"
    assert found.shape is not None
    assert (found.shape.n_layers, found.shape.n_experts) == (3, 16)


def driver(folder: Path, says: str) -> None:
    """A program nvidia-smi that prints ``says``."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("says", "machine", "gb_per_s"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 4, 16", "rtx4090", 0.78 * 1.969 * 16),
        ("NVIDIA GeForce RTX 4060, 8188, 4, 8", "rtx4060", 0.78 * 1.969 * 8),
        ("NVIDIA GeForce RTX 5070 Ti, 16303, 5, 16", "rtx5070ti", 0.78 * 3.938 * 16),
        ("Tesla T4, 15360, 3, 16", "t4", 0.78 * 0.985 * 16),
        ("NVIDIA A100-SXM4-80GB, 81920, 4, 16", "a100", 0.78 * 1.969 * 16),
        ("NVIDIA H100 80GB HBM3, 81559, 5, 16", "h100", 0.78 * 3.938 * 16),
        ("NVIDIA GeForce RTX 3080 Laptop GPU, 16384, [N/A], [N/A]", "rtx3080-mobile", 24.0),
    ],
)
def test_the_driver_names_this_machine_s_card(
    says: str, machine: str, gb_per_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, says)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = find_here()
    assert found.machine.name == machine
    assert found.machine.link.bytes_per_s == pytest.approx(gb_per_s * 1e9)
    assert found.memory_bytes == int(0.9 * int(says.split(", ")[1]) * 2**20)


def test_an_unknown_card_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path, "NVIDIA GeForce GTX 1080, 8192, 3, 16")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SimulationError, match="GTX 1080, and no profile is of that card"):
        find_here()


def test_without_a_card_memory_is_the_host_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_here()
    assert found.machine.experts_in == "disk"
    assert found.memory_bytes == int(0.9 * 1000 * 1024)


def test_experts_that_host_memory_has_no_room_for_come_from_disk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = on_disk(moesim.load_machine("t4"), "nvme-gen4", 10**9)
    assert machine.disk is not None
    assert machine.disk.host_bytes == 10**9
    with pytest.raises(SimulationError, match="experts are in host memory"):
        on_disk(machine, "t4", 0)
    speeds = {}
    for host in ("4GiB", "64GiB"):
        options = ["--machine", "t4", "--host-memory", host, "--policy", "lru", "--format", "json"]
        assert recommend("mixtral-8x7b", *options) == 0
        found = json.loads(capsys.readouterr().out)
        speeds[host] = found["tokens_per_s"]
        assert ("host-memory" in found["options"]) == (host == "4GiB")
    assert speeds["4GiB"] < speeds["64GiB"]
    assert np.isfinite(speeds["4GiB"])
