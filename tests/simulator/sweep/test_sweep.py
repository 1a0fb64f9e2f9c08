"""Sweeps as a user runs them: real workers, kills, resumption, one result."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from moeroute import open_trace
from moesim import SimulationError, load_machine, simulate, workload_for
from moesim.sweep import Grid, SweepSettings, run_sweep
from moesim.sweep.loop import Watcher
from moesim.workload.loading import SKELETON
from polars.testing import assert_frame_equal
from support.object_store import object_store
from support.traces import decoded, random_trace, write_trace

POLICIES = Path(__file__).parents[2] / "support" / "sweep_policies.py"
COMMAND = [sys.executable, "-c", "from moesim.cli import main; main()", "sweep"]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(tmp_path / "trace.parquet"))


def policy(name: str) -> str:
    return f"{POLICIES}:{name}"


def sweep(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def swept(grid: Grid, out: Path, **settings: Any) -> pl.DataFrame:
    run_sweep(grid, str(out), SweepSettings(**settings))
    return pl.read_parquet(out)


def test_the_numbers_are_those_of_single_runs_whatever_the_workers(
    tmp_path: Path, trace: str
) -> None:
    from moepolicy import find_policy
    from moeroute import open_trace

    grid = Grid(
        ("lru", "random", policy("First")),
        (trace,),
        slots=(1, 3),
        scopes=("layer", "global"),
        machines=("t4", "a100"),
        parameters={"random": {"seed": ("1", "2")}},
    )
    one = swept(grid, tmp_path / "one.parquet", workers=1)
    three = swept(grid, tmp_path / "three.parquet", workers=3)
    assert_frame_equal(one, three)
    assert len(one) == 4 * 2 * 2 * 2
    assert set(one["parameters"]) == {'{"seed": 1}', '{"seed": 2}', "{}"}
    for number in (0, 5, 18, 31):
        row = one.row(number, named=True)
        spec = find_policy(row["policy"])
        expected = simulate(
            workload_for(open_trace(trace), [spec]),
            spec,
            load_machine(row["machine"]),
            slots=row["slots"],
            scope=row["scope"],
        ).row()
        assert {name: row[name] for name in expected} == expected
    # Nothing is left beside the results.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.parquet",
        "three.parquet",
        "trace.parquet",
    ]


@pytest.mark.slow
def test_the_command_from_a_file_and_flags(tmp_path: Path, trace: str) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(f"policies = ['lru', 'lfu']\ntraces = {trace!r}\nslots = [1, 2]\n")
    out = tmp_path / "r.parquet"
    done = sweep("--grid", grid, "--machine", "t4,a100", "--out", out, "--format", "json")
    best = json.loads(done.stdout)
    assert [(row["machine"], row["slots"]) for row in best] == [
        ("t4", 1),
        ("t4", 2),
        ("a100", 1),
        ("a100", 2),
    ]
    frame = pl.read_parquet(out)
    assert len(frame) == 8
    assert frame["moesim_version"].null_count() == 0
    assert "8 points; 8 run in" in done.stderr
    assert "tokens/s" in sweep("--grid", grid, "--slots", "1", "--out", out, "--force").stdout


def test_experts_are_counted_in_the_calibration_trace(tmp_path: Path) -> None:
    """One slot: by its own counts it is expert 0's, by the other trace's expert 1's."""
    trace = write_trace(tmp_path / "t.parquet", decoded([[0]], [[1]], [[0]], [[1]], [[0]]), 3)
    other = write_trace(tmp_path / "o.parquet", decoded([[1]], [[1]], [[0]]), 3)
    grid = Grid(("static",), (str(trace),), (1,), calibration=str(other))
    (row,) = swept(grid, tmp_path / "r.parquet").iter_rows(named=True)
    assert (row["hits"], row["loads"]) == (1, 4)
    assert row["calibration_sha256"] == open_trace(other).digest
    (own,) = swept(replace(grid, calibration=None), tmp_path / "s.parquet").iter_rows(named=True)
    assert (own["hits"], own["loads"]) == (2, 3)


@pytest.mark.slow
def test_points_that_fail_are_rows_and_the_others_finish(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    arguments: list[str | Path] = [
        "lru",
        policy("Faulty"),
        "--trace",
        trace,
        "--slots",
        "1,2",
        "--out",
        out,
    ]
    done = sweep(*arguments, code=1)
    frame = pl.read_parquet(out)
    assert frame["status"].to_list() == ["ok", "failed", "ok", "ok"]
    assert "cannot live with 1" in frame["error"][1]
    assert "1 of 4 points failed" in done.stderr
    assert "Faulty slots=1" in done.stderr
    assert "cannot live with 1" in done.stderr
    # The failed one alone is tried again.
    again = sweep(*arguments, "--resume", code=1)
    assert "1 run in" in again.stderr
    assert "3 finished before" in again.stderr


def test_when_every_point_fails_the_reason_is_all_there_is(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    done = sweep("lru", "--trace", trace, "--memory", "5,9", "--out", out, code=1)
    assert done.stderr.startswith("error: none of the grid's 2 points can be simulated: 5 bytes")
    assert "staging buffers of policy 'lru'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert not (tmp_path / "r.parquet.partial").exists()


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
        [*COMMAND, *map(str, arguments)],
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


@pytest.mark.parametrize("change", [{"loads": "x"}, {"loads": None, "slots": 2.5}, {"engine": 3}])
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


def test_what_a_policy_says_is_passed_on_once(tmp_path: Path, trace: str) -> None:
    said: list[str] = []
    grid = Grid((policy("Talking"),), (trace,), (1, 2, 3))
    run_sweep(grid, str(tmp_path / "r.parquet"), SweepSettings(workers=2), Watcher(say=said.append))
    assert said == ["policy 'talking' has been made"]


def test_what_was_asked_for_in_vain_is_noted(tmp_path: Path) -> None:
    said: list[str] = []
    grid = Grid(("lru",), ("mixtral-like",), (4, 9), like="mixtral-8x7b", limits=False)
    report = run_sweep(
        grid, str(tmp_path / "r.parquet"), SweepSettings(workers=1), Watcher(say=said.append)
    )
    assert len(report.rows) == 2
    assert any("has its own sizes: --like mixtral-8x7b" in note for note in said)
    assert any(note.startswith("note: --slots 9: ") for note in said)
    assert len(said) == 2


def test_a_trace_that_changes_meanwhile_is_noticed(tmp_path: Path, trace: str) -> None:
    from moesim.sweep.plan import make_plan
    from moesim.sweep.worker import SweepWorker

    plan = make_plan(Grid(("lru",), (trace,), (1, 2)))
    random_trace(Path(trace), seed=7)
    worker = SweepWorker(plan.job, tmp_path / "scratch", "node-3")
    for point in plan.points:
        error = str(worker.run(point).error)
        assert error.startswith(f"on node node-3: {trace} is not the trace the sweep began with")
    Path(trace).unlink()
    error = str(SweepWorker(plan.job, tmp_path / "scratch", "node-3").run(plan.points[0]).error)
    assert error == f"on node node-3: {trace}: there is no such trace"


def test_a_trace_is_found_from_another_folder(
    tmp_path: Path, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesim.sweep.plan import make_plan
    from moesim.sweep.worker import SweepWorker

    monkeypatch.chdir(tmp_path)
    plan = make_plan(Grid(("lru",), (Path(trace).name,), (1,)))
    assert plan.labels(plan.points[0])["trace_path"] == Path(trace).name
    monkeypatch.chdir("/")
    assert SweepWorker(plan.job, tmp_path / "scratch").run(plan.points[0]).error is None


def test_a_policy_file_travels_with_the_job(tmp_path: Path, trace: str) -> None:
    from moesim.sweep.plan import make_plan
    from moesim.sweep.worker import SweepWorker

    file = tmp_path / "mine.py"
    file.write_text(POLICIES.read_text())
    plan = make_plan(Grid((f"{file}:First",), (trace,), (1,)))
    file.unlink()  # as on another node
    outcome = SweepWorker(plan.job, tmp_path / "scratch").run(plan.points[0])
    assert outcome.error is None
    assert outcome.row is not None
    assert outcome.row["policy"] == f"{file}:First"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["lru"], 2, "--out is missing"),
        (["--out", "r.parquet"], 2, "the grid has no policies"),
        (["lru", "--out", "absent/r.parquet"], 1, "absent does not exist"),
        (["lru", "--out", "."], 1, ". is a folder"),
        (["lru", "--out", "r", "--slots", "few"], 2, "slots: 'few' is not a whole number"),
        (["lru", "--out", "r", "--param", "n=1"], 2, "'n=1' is not policy:parameter=value"),
        (["lru", "--out", "r", "--workers", "0"], 2, "--workers must be 1 or more"),
        (["lru", "--out", "r.parquet", "--on", "moon"], 2, "--on is 'moon'"),
        (["lru", "--out", "r", "--grid", "absent.toml"], 1, "absent.toml"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = sweep(*arguments, code=code)
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
    if done.stderr.startswith("error: "):
        assert done.stderr.count("\n") == 1


def test_the_library_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="the grid has no policies"):
        run_sweep(Grid(()), str(tmp_path / "r.parquet"))


@pytest.mark.slow
def test_traces_and_results_in_an_object_store(
    tmp_path: Path, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    axes = ["--slots", "1,2", "--machine", "t4"]
    out = "s3://results/deep/r.parquet"
    with object_store() as store:
        store.objects["/traces/t.parquet"] = Path(trace).read_bytes()
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        sweep("lru", "--trace", "s3://traces/t.parquet", *axes, "--out", out)
        assert not Path("r.parquet.partial").exists()
        again = sweep(
            "lru", "lfu", "--trace", "s3://traces/t.parquet", *axes, "--out", out, "--resume"
        )
        assert "2 run in" in again.stderr
        assert "2 finished before" in again.stderr
        there = pl.read_parquet(store.objects["/results/deep/r.parquet"])
        taken = sweep("lru", "--trace", "s3://traces/t.parquet", *axes, "--out", out, code=1)
        assert "exists already, a finished sweep of 4 points" in taken.stderr
        elsewhere = out.replace("r.parquet", "other.parquet")
        absent = sweep("lru", "--trace", "s3://traces/absent.parquet", "--out", elsewhere, code=1)
        assert absent.stderr == "error: s3://traces/absent.parquet: there is no such trace\n"
    sweep("lru", "lfu", "--trace", trace, *axes, "--out", "here.parquet")
    told = ["key", "trace_path", "trace_sha256"]  # the place, and what its digest is of
    assert_frame_equal(there.drop(told), pl.read_parquet("here.parquet").drop(told))


@pytest.mark.slow
def test_a_result_that_cannot_be_written_costs_no_point(
    tmp_path: Path, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    axes = ["lru", "--trace", trace, "--slots", "1,2"]
    with object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        store.refusing = True
        done = sweep(*axes, "--out", "s3://results/r.parquet", code=1)
    assert "error: s3://results/r.parquet: cannot be read or written" in done.stderr
    assert "2 of 2 points are kept in r.parquet.partial: --resume goes on" in done.stderr
    again = sweep(*axes, "--out", "r.parquet", "--resume")
    assert "0 run in" in again.stderr
    assert len(pl.read_parquet("r.parquet")) == 2
