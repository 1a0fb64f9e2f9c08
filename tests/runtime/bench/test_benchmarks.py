"""The scripts in benchmarks/ run, on a small shape and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moerun.bench.models import find_config

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = find_config("mixtral-8x7b", layers=4)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 512, 100
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    folder: Path = tmp_path_factory.mktemp("shapes") / "small"
    config.save_pretrained(folder)
    return folder


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_the_gpu_script_runs_every_step(tmp_path: Path, shape: Path) -> None:
    done = run(
        *("bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path)),
        PYTHON=sys.executable,
        DEVICE="cpu",
        SHAPE=str(shape),
        TOKENS="3",
        ROUNDS="1",
        LAYERS="2",
        KERNELS="--shapes 64x64 --tokens 1 --rounds 1 --products 1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {step["step"]: step["exit"] for step in summary["steps"]} == dict.fromkeys(
        ["machine", "tests", "kernels", "bench-2bit", "bench-4bit", "accelerate", "bookkeeping"], 0
    )
    for name in ("fused_gpu", "bench-2bit", "bench-4bit", "offload_gpu", "bookkeeping"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["rows"]
        assert found["hardware"]["cpu"]


@pytest.mark.slow
def test_a_step_that_fails_fails_the_script_and_not_the_others(tmp_path: Path) -> None:
    done = run(
        *("bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path)),
        PYTHON=sys.executable,
        DEVICE="cpu",
        SHAPE="no-such-shape",
        KERNELS="--shapes 64x64 --tokens 1 --rounds 1 --products 1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1
    exits = {
        s["step"]: s["exit"] for s in json.loads((tmp_path / "summary.json").read_text())["steps"]
    }
    assert exits["bench-2bit"] == 2
    assert exits["bookkeeping"] == 0


@pytest.mark.slow
def test_every_engine_decodes_the_same_from_disk(tmp_path: Path, shape: Path) -> None:
    done = run(
        *(sys.executable, str(BENCHMARKS / "offload_cpu.py"), "--folder", str(tmp_path / "w")),
        *("--shape", str(shape), "--hidden", "0", "--layers", "4", "--rounds", "1"),
        *("--tokens", "4", "--warm-up", "1", "--no-limit", "--out", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["engine"] for row in found["rows"]] == ["lru", "lru-spec", "accelerate", "mmap"]
    assert all(row["same_tokens_as_mmap"] for row in found["rows"])
    assert found["limit_covers"] == "nothing"


@pytest.mark.slow
def test_matrices_are_timed_for_few_and_many_tokens(tmp_path: Path) -> None:
    done = run(
        *(sys.executable, str(BENCHMARKS / "expert_tokens.py"), "--shapes", "128x64"),
        *("--tokens", "1,80", "--rounds", "1", "--out", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(done.stdout.splitlines()) == len(found["rows"]) == 2 * 3
    native = found["hardware"]["avx512_bf16"]
    for row in found["rows"]:
        assert row["takes"] == ("blockwise" if native and row["tokens"] == 80 else "kernel")
        assert all(ms > 0 for ms in row["ms"].values())


@pytest.mark.slow
def test_prompts_in_chunks_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "chunks.json"
    done = run(
        *(sys.executable, str(BENCHMARKS / "exact_reuse.py"), "--tokens", "40"),
        *("--chunks", "0,16", "--rounds", "1", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["slots"], row["chunk_tokens"]) for row in rows] == [
        *((32, 0), (32, 16)),
        *((16, 0), (16, 16)),
    ]
    assert all(row["cpu_s"] > 0 for row in rows)


@pytest.mark.slow
def test_published_experts_are_timed(tmp_path: Path) -> None:
    done = run(
        *(sys.executable, str(BENCHMARKS / "published_experts.py"), "--tokens", "1"),
        *("--models", "qwen3-30b-a3b-fp8", "--rounds", "1", "--out", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(row["ms"]) == {"fp8", "bf16", "4bit"}
    assert all(ms > 0 for ms in row["ms"].values())
    assert row["record_bytes"]["4bit"] < row["record_bytes"]["fp8"] < row["record_bytes"]["bf16"]


@pytest.mark.slow
def test_kernels_of_a_gpu_are_timed(tmp_path: Path) -> None:
    done = run(
        *(sys.executable, str(BENCHMARKS / "fused_gpu.py"), "--device", "cpu", "--shapes", "64x64"),
        *("--tokens", "1", "--rounds", "1", "--products", "2", "--out", str(tmp_path / "out.json")),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(done.stdout.splitlines()) == len(rows) == 3
    for row in rows:
        assert row["largest_difference"] < 0.02
        assert all(us > 0 for us in row["us"].values())


@pytest.mark.slow
def test_caches_of_keys_and_values_are_timed(tmp_path: Path) -> None:
    done = run(
        *(sys.executable, str(BENCHMARKS / "kv_cache.py"), "--contexts", "8,300"),
        *("--layers", "1", "--hidden", "64", "--tokens", "2", "--rounds", "1"),
        *("--out", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(done.stdout.splitlines()) == len(rows) == 2
    for row in rows:
        assert set(row["ms_per_token"]) == {"dynamic", "static", "moerun"}
        assert all(ms > 0 for ms in row["ms_per_token"].values())
