"""The main job as a user does it: record, compare, run, and the two worlds agreeing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COUNTS = ("requests", "hits", "late", "misses", "loads", "bypasses", "prefetches")


def run(command: str, *arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    package = {"moesim": "moesim", "moerun": "moerun", "moetrace": "moetrace"}[command]
    start = f"from {package}.cli import main; main()"
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def compare(trace: Path, policy: str, slots: int, home: Path) -> dict[str, Any]:
    options = ("--trace", trace, "--slots", str(slots), "--format", "json")
    row: dict[str, Any] = json.loads(run("moesim", "compare", policy, *options, home=home).stdout)[
        0
    ]
    return row


@pytest.mark.slow
def test_record_a_corpus_and_compare_policies_on_it(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The whole of science is nothing more than a refinement. " * 40)
    trace = tmp_path / "t.parquet"
    run("moetrace", "record", corpus, "--out", trace, "--tokens", "300", home=tmp_path)
    rows = {name: compare(trace, name, 4, tmp_path) for name in ("lru", "belady", "lru-spec")}
    assert rows["belady"]["loads"] <= rows["lru"]["loads"]
    assert rows["lru"]["limit_loads"] <= rows["belady"]["loads"]
    assert rows["lru-spec"]["prefetches"] > 0
    assert rows["lru"]["steps"] == 300 * 8


@pytest.mark.parametrize("policy", ["lru", pytest.param("lfu", marks=pytest.mark.slow)])
def test_what_ran_live_is_what_the_simulator_decides(tmp_path: Path, policy: str) -> None:
    """Without prefetching the clocks say nothing: the counts are equal, prompt and decode."""
    trace = tmp_path / "live.parquet"
    done = run(
        "moerun",
        "--policy",
        policy,
        "--slots",
        "3",
        "--prompt",
        "It was a bright cold day in April, and the clocks were striking thirteen.",
        "--max-new-tokens",
        "24",
        "--record",
        trace,
        "--format",
        "json",
        home=tmp_path,
    )
    live = json.loads(done.stdout)
    live = live[0] if isinstance(live, list) else live
    simulated = compare(trace, policy, 3, tmp_path)
    assert {name: live[name] for name in COUNTS} == {name: simulated[name] for name in COUNTS}
    assert live["misses"] > 0
