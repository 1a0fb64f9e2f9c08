"""Sweeps as a user runs them: real workers, kills, resumption, one result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from moeroute import open_trace
from moesim import SimulationError, load_machine, simulate, workload_for
from moesim.sweep import Grid, SweepSettings, run_sweep
from moesim.sweep.loop import Watcher
from polars.testing import assert_frame_equal
from support.object_store import object_store
from support.sweeps import POLICIES, policy, sweep, swept
from support.traces import decoded, random_trace, write_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(tmp_path / "trace.parquet"))


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
