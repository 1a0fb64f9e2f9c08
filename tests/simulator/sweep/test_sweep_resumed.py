"""Sweeps that are killed, interrupted or damaged: what is kept, and how they are taken up."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from moeroute import open_trace
from moesim.sweep import Grid, SweepSettings, run_sweep
from moesim.sweep.journal import SweepJournal
from moesim.workload.loading import SKELETON
from polars.testing import assert_frame_equal
from support.sweeps import SWEEP, policy, sweep, swept
from support.traces import random_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(tmp_path / "trace.parquet"))


def test_a_killed_worker_is_named_and_its_point_tried_again(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    deadly = f"{policy('Deadly')}:where={tmp_path},times=1"
    done = sweep("lru", deadly, "--trace", trace, "--slots", "1,2", "--out", out)
    assert "was killed by SIGKILL (out of memory, or by hand) at " in done.stderr
    assert "Deadly" in done.stderr
    assert "tried once more" in done.stderr
    assert set(pl.read_parquet(out)["status"]) == {"ok"}


def test_a_point_that_kills_its_workers_fails_alone(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    deadly = f"{policy('Deadly')}:where={tmp_path},times=9"
    arguments = ["lru", deadly, "--trace", trace, "--slots", "1,2", "--workers", "1"]
    done = sweep(*arguments, "--out", out, code=1)
    frame = pl.read_parquet(out)
    assert frame["status"].to_list() == ["ok", "failed", "ok", "ok"]
    assert "SIGKILL" in frame["error"][1]
    assert "for the second time" in done.stderr


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SWEEP, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_points(folder: Path, n: int) -> None:
    journal = folder / "points.jsonl"
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < n:
        assert time.monotonic() < until, "no point was finished"
        time.sleep(0.02)


def alive(session: int) -> list[int]:
    """Processes of a session, but for those that have ended and are not yet waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_sweep_goes_on_where_it_was_also_with_another_grid(
    tmp_path: Path, trace: str
) -> None:
    out = tmp_path / "r.parquet"
    arguments = [policy("Slow"), "--trace", trace, "--scope", "layer,global", "--out", str(out)]
    first = start(*arguments, "--slots", "0,1,2,3", "--workers", "1")
    wait_for_points(tmp_path / "r.parquet.partial", 2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    until = time.monotonic() + 30
    while alive(first.pid):  # its workers do not outlive it
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not out.exists()
    refused = sweep(*arguments, "--slots", "1", code=1)
    assert "finished points of an unfinished sweep: --resume goes on" in refused.stderr

    done = sweep(*arguments, "--slots", "0,1,4", "--resume")
    frame = pl.read_parquet(out)
    assert frame["slots"].to_list() == [0, 1, 4, 0, 1, 4]
    kept = int(done.stderr.rpartition(", ")[2].split()[0])
    assert kept >= 2
    assert f"{6 - kept} run in" in done.stderr
    assert_frame_equal(frame, swept(grid_of(trace), tmp_path / "fresh.parquet", workers=2))
    assert not (tmp_path / "r.parquet.partial").exists()


@pytest.mark.parametrize(
    "change",
    [{"loads": "x"}, {"loads": None}, {"loads": 1 << 64}, {"slots": 2.5}, {"engine": 3}],
)
@pytest.mark.parametrize("damaged", ["changed", "taken out"])
def test_a_point_that_is_damaged_is_run_again(
    tmp_path: Path,
    trace: str,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    damaged: str,
) -> None:
    grid, out = Grid(("lru",), (trace,), (0, 1)), tmp_path / "r.parquet"
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr("moesim.sweep.run.write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            swept(grid, out, workers=1)
    points = tmp_path / "r.parquet.partial/points.jsonl"
    (key, row), *others = [json.loads(line) for line in points.read_text().splitlines()]
    if damaged == "changed":
        row |= change
    else:
        row = {name: value for name, value in row.items() if name not in change}
    points.write_text("".join(json.dumps(line) + "\n" for line in [[key, row], *others]))
    fresh = swept(grid, tmp_path / "fresh.parquet", workers=1)
    report = run_sweep(grid, str(out), SweepSettings(workers=1, resume=True))
    assert report.kept == len(others)
    assert_frame_equal(pl.read_parquet(out), fresh)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_resumed_sweep_runs_no_code_of_the_folder_that_it_resumes_from(
    tmp_path: Path, trace: str
) -> None:
    """Its workers share arrays by a pickle, which somebody else may have put there."""
    digest, ran = open_trace(trace).digest, tmp_path / "ran"
    for columns in range(16):
        shared = tmp_path / f"r.parquet.partial/scratch/{digest[:16]}-{columns:04b}"
        shared.mkdir(parents=True)
        (shared / SKELETON).write_bytes(pickle.dumps(Payload(ran)))
    sweep("lru", "--trace", trace, "--slots", "1", "--out", tmp_path / "r.parquet", "--resume")
    assert not ran.exists()


def grid_of(trace: str) -> Grid:
    return Grid((policy("Slow"),), (trace,), (0, 1, 4), scopes=("layer", "global"))


@pytest.mark.slow
def test_an_interrupted_sweep_says_what_it_keeps(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    running = start(policy("Slow"), "--trace", trace, "--slots", "0,1,2,3,4", "--out", out)
    wait_for_points(tmp_path / "r.parquet.partial", 1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "interrupted: " in said
    assert "of 5 points are kept in" in said
    assert "Traceback" not in said
    sweep(policy("Slow"), "--trace", trace, "--slots", "0,1", "--out", out, "--restart")
    assert len(pl.read_parquet(out)) == 2


def test_a_journal_that_does_not_reach_the_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = SweepJournal(tmp_path / "r.parquet.partial")
    journal.add("key", {"status": "ok"})
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=r"points\.jsonl"):
        journal.close()
    journal.remove()  # what is deleted needs no sync
    assert not journal.folder.exists()
