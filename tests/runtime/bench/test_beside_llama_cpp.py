"""The comparison with llama.cpp runs on tiny shapes, with llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "llama_cpp.py"


def compare(folder: Path, llama_python: str, shapes: str) -> Any:
    out = folder / "found.json"
    options = f"--shapes {shapes} --prompt 6 --tokens 3 --rounds 1 --threads 1 --memory all"
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), *options.split()),
            *("--folder", str(folder), "--llama-python", llama_python, "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert done.stdout.strip() == table.strip()
    for case in found["cases"]:
        assert f"| {case['shape']} | all | moerun lru |" in table
        ours = case["engines"][0]
        assert ours["decode_tokens_per_s"] > 0
        assert ours["hit_ratio"] == 1.0
        where = case["where_ours_goes"]
        told = where["parts"][1]
        assert 0 < told["pass/experts/kernel"] < told["pass"] < where["whole_s"][1]
    return found


@pytest.mark.slow
def test_the_script_runs_without_llama_cpp(tmp_path: Path) -> None:
    found = compare(tmp_path, "-", "tiny-qwen3")
    assert [engine["engine"] for engine in found["cases"][0]["engines"]] == ["moerun lru"]


@pytest.mark.slow
def test_both_engines_compute_the_same(tmp_path: Path) -> None:
    """Needs llama-cpp-python here, or LLAMA_PYTHON, an interpreter that has it."""
    llama_python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if llama_python == sys.executable and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    found = compare(tmp_path, llama_python, "tiny-mixtral,tiny-qwen3")
    for case in found["cases"]:
        ours, theirs = case["engines"]
        assert theirs["engine"] == "llama.cpp"
        assert "AVX" in theirs["system"] or "NEON" in theirs["system"]
        assert ours["logits_correlation"] > 0.999
        assert ours["same_likeliest"] > 0.7
