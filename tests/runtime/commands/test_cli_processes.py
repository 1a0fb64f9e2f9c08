"""The command as a process of its own: first runs, signals, kills, and help without libraries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from moeroute import open_trace
from support.commands import PROMPT, Call

PATIENCE_S = 120


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from moerun.cli import main; main()", *map(str, arguments)]


def process(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(home),
        check=False,
    )


def test_a_first_run_packs_streams_text_and_reports(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, journal = tmp_path / "run.parquet", tmp_path / "run.json"
    options = ("--policy", "lru-spec", "--slots", "3", "--max-new-tokens", "12")
    arguments = (*options, "--prompt", PROMPT, "--link-gbps", "1")
    first = process(tmp_path, *arguments, "--record", trace, "--journal", journal)
    assert first.returncode == 0, first.stderr
    assert "packing tiny (native) into" in first.stderr
    assert len(first.stdout.split()) > 3
    for word in ("lru-spec", "tokens/s decoding", "hits", "late", "misses", "stall", "memory"):
        assert word in first.stderr
    meta = open_trace(trace).meta
    assert (meta.source, meta.horizon) == ("live", 1)
    assert json.loads(journal.read_text())["policy"] == "lru-spec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = moerun(*arguments)
    assert second.stderr.startswith("policy ")
    assert second.stdout == first.stdout


@pytest.mark.slow
def test_ctrl_c_ends_with_the_statistics_and_the_files(home: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "400", "--slots", "1")
    process = subprocess.Popen(
        command(*arguments, "--link-gbps", "0.02", "--record", trace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
    )
    assert process.stdout is not None
    process.stdout.read(5)  # it is generating
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "tokens/s decoding" in errors
    assert "(interrupted)" in errors
    opened = open_trace(trace)
    opened.validate()
    assert rest.endswith("\n")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_killed_first_run_leaves_a_cache_that_works(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.Popen(
        command("--prompt", PROMPT, "--max-new-tokens", "3"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path),
    )
    stores = tmp_path / "moerun" / "stores"
    deadline_s = time.monotonic() + PATIENCE_S
    while not list(stores.glob("*.partial/store/*.safetensors")) and killed.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = moerun("--prompt", PROMPT, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_needs_no_model_libraries(home: Path) -> None:
    program = (
        "import sys; from moerun.cli import app; "
        "app(['generate', '--help'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'polars')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(home),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--policy", "--prompt", "--slots", "--memory", "--link-gbps", "--record"):
        assert option in done.stdout
