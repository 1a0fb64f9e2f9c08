"""A sweep's parts by themselves: journal, schedule, the loop over workers, results, summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from moepolicy.tables import to_csv, to_json
from moesim import SimulationError
from moesim.result import Result
from moesim.sweep.events import Finished, Lost, PoolEvent, Ready
from moesim.sweep.grid import Grid
from moesim.sweep.journal import SweepJournal
from moesim.sweep.loop import Sweep, Watcher
from moesim.sweep.plan import SweepPlan, make_plan
from moesim.sweep.point import SweepPoint
from moesim.sweep.results import METADATA, read_finished, table, write
from moesim.sweep.schedule import Schedule
from moesim.sweep.summary import best
from moesim.sweep.summary import table as table_of_best
from moesim.sweep.worker import Outcome, SweepWorker
from support.traces import random_trace


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    traces = tuple(str(random_trace(tmp_path / f"{seed}.parquet", seed=seed)) for seed in (0, 1))
    policies = ("lru", "lfu", "random:seed=1", "random:seed=2")
    return make_plan(Grid(policies, traces, (1, 2, 3), limits=False))


class Scripted:
    """A pool without processes. ``deaths`` says at which points a worker dies, how often."""

    def __init__(self, plan: SweepPlan, n_workers: int = 2, deaths: dict[int, int] | None = None):
        self.n_workers = n_workers
        self.worker = SweepWorker(plan.job, Path("/nonexistent"))
        self.deaths = deaths or {}
        self.given: list[list[int]] = []
        self.stopped = False
        self._events: list[PoolEvent] = []
        self._n = n_workers

    def start(self) -> None:
        self._events += [Ready(worker) for worker in range(self.n_workers)]

    def give(self, worker: int, points: Sequence[tuple[int, SweepPoint]]) -> None:
        self.given.append([number for number, _ in points])
        for number, _ in points:
            if self.deaths.get(number, 0) > 0:
                self.deaths[number] -= 1
                self._events += [Lost(worker, f"worker {worker} fell over"), Ready(self._n)]
                self._n += 1
                return
            row = {"slots": 1, "policy": "x", "number": number}
            self._events.append(Finished(worker, number, Outcome(row)))

    def events(self, timeout_s: float) -> list[PoolEvent]:
        events, self._events = self._events, []
        assert events, "the sweep waits for nothing"
        return events

    def stop(self) -> None:
        self.stopped = True

    def numbers(self) -> list[int]:
        """Every point that was given out, as often as it was."""
        return [number for given in self.given for number in given]


def test_a_journal_keeps_what_was_added_and_drops_a_torn_line(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with SweepJournal(folder) as journal:
        journal.add("a", {"x": 0.1, "y": float("inf")})
        journal.add("b", {"x": 2})
    file = folder / "points.jsonl"
    with file.open("ab") as end:
        end.write(b'["c", {"x": ')  # killed while it wrote
    with SweepJournal(folder) as journal:
        assert journal.finished == {"a": {"x": 0.1, "y": float("inf")}, "b": {"x": 2}}
        journal.add("d", {"x": 4})
    with SweepJournal(folder) as journal:
        assert list(journal.finished) == ["a", "b", "d"]


def test_a_damaged_line_costs_one_point(tmp_path: Path) -> None:
    with SweepJournal(tmp_path / "j") as journal:
        for key in "abc":
            journal.add(key, {"x": key})
    file = tmp_path / "j" / "points.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = bytes(len(lines[1]) - 1) + b"\n"
    file.write_bytes(b"".join(lines))
    with SweepJournal(tmp_path / "j") as journal:
        assert list(journal.finished) == ["a", "c"]


@pytest.mark.parametrize("line", [b"3", b"[[1], {}]", b'["x"]', b'["x", 3]', b'"x"'])
def test_a_line_of_something_else_is_no_point(tmp_path: Path, line: bytes) -> None:
    with SweepJournal(tmp_path / "j") as journal:
        journal.add("a", {"x": 1})
    with (tmp_path / "j" / "points.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with SweepJournal(tmp_path / "j") as journal:
        assert list(journal.finished) == ["a"]
        journal.add("b", {"x": 2})
    with SweepJournal(tmp_path / "j") as journal:
        assert list(journal.finished) == ["a", "b"]


def test_a_journal_is_one_sweep_s(tmp_path: Path) -> None:
    with (
        SweepJournal(tmp_path / "j"),
        pytest.raises(SimulationError, match=r"j is in use by another sweep"),
    ):
        SweepJournal(tmp_path / "j")
    SweepJournal(tmp_path / "j").remove()
    assert not (tmp_path / "j").exists()


def test_workers_keep_to_a_trace_and_a_policy_s_class(plan: SweepPlan) -> None:
    schedule = Schedule(plan, range(len(plan.points)), 2)
    taken: dict[int, list[int]] = {0: [], 1: []}
    turn = 0
    while len(schedule):
        taken[turn] += schedule.take(turn)
        turn = 1 - turn
    assert sorted(taken[0] + taken[1]) == list(range(len(plan.points)))
    groups = [[schedule._group(number) for number in numbers] for numbers in taken.values()]
    changes = [pair for seen in groups for pair in pairwise(seen) if pair[0] != pair[1]]
    # Six groups, two workers: four changes, and one who is done first helps the other out.
    assert len(changes) <= 5
    assert sum(one[0] != other[0] for one, other in changes) <= 1


def test_an_idle_worker_takes_over_what_others_have_left(plan: SweepPlan) -> None:
    schedule = Schedule(plan, range(len(plan.points)), 2)
    schedule.take(0)
    seen: list[int] = []
    while numbers := schedule.take(1):
        seen += numbers
    assert {plan.points[number].trace for number in seen} == {0, 1}
    assert len(schedule) == 0


def test_batches_shrink_towards_the_end(plan: SweepPlan) -> None:
    schedule = Schedule(plan, range(len(plan.points)), 1)
    sizes = []
    while numbers := schedule.take(0):
        sizes.append(len(numbers))
    assert sizes[0] > 1
    assert sizes[-1] == 1


def test_every_point_is_run_once_and_rows_are_in_the_grid_s_order(
    tmp_path: Path, plan: SweepPlan
) -> None:
    pool = Scripted(plan)
    with SweepJournal(tmp_path / "j") as journal:
        sweep = Sweep(plan, journal)
        sweep.run(pool)
        rows = sweep.rows()
    assert sorted(pool.numbers()) == list(range(len(plan.points)))
    assert [row["key"] for row in rows] == [point.key for point in plan.points]
    assert [row["number"] for row in rows] == list(range(len(plan.points)))
    assert {row["status"] for row in rows} == {"ok"}
    assert pool.stopped


def test_a_dead_worker_s_points_go_to_another(tmp_path: Path, plan: SweepPlan) -> None:
    said: list[str] = []
    pool = Scripted(plan, deaths={5: 1})
    with SweepJournal(tmp_path / "j") as journal:
        sweep = Sweep(plan, journal, Watcher(say=said.append))
        sweep.run(pool)
    assert not sweep.failed
    assert sorted(pool.numbers()).count(5) == 2
    (line,) = said
    assert "fell over at " in line
    assert plan.name(plan.points[5]) in line
    assert "tried once more" in line


def test_a_point_that_kills_twice_has_failed_and_the_others_are_done(
    tmp_path: Path, plan: SweepPlan
) -> None:
    pool = Scripted(plan, deaths={5: 9})
    with SweepJournal(tmp_path / "j") as journal:
        sweep = Sweep(plan, journal)
        sweep.run(pool)
        rows = sweep.rows()
    assert pool.numbers().count(5) == 2
    assert [row["status"] for row in rows].count("ok") == len(plan.points) - 1
    assert "fell over" in rows[5]["error"]


def test_finished_points_are_not_run_again_whatever_else_the_grid_has(
    tmp_path: Path, plan: SweepPlan
) -> None:
    done = {point.key: {"number": -1} for point in plan.points[::2]}
    with SweepJournal(tmp_path / "j") as journal:
        for key, row in done.items():
            journal.add(key, row)
        sweep = Sweep(plan, journal)
        pool = Scripted(plan)
        sweep.run(pool)
    assert sorted(pool.numbers()) == list(range(1, len(plan.points), 2))


def test_points_that_come_to_the_same_are_run_once(tmp_path: Path) -> None:
    names = []
    for name in ("one", "other"):
        profile = tmp_path / f"{name}.toml"
        profile.write_text(f"name = '{name}'\n[link]\nbytes_per_s = 1e9\n")
        names.append(str(profile))
    trace = str(random_trace(tmp_path / "t.parquet"))
    plan = make_plan(Grid(("lru",), (trace,), (1,), machines=tuple(names), limits=False))
    pool = Scripted(plan)
    with SweepJournal(tmp_path / "j") as journal:
        sweep = Sweep(plan, journal)
        sweep.run(pool)
        rows = sweep.rows()
    assert pool.numbers() == [0]
    assert [row["machine"] for row in rows] == ["one", "other"]


def test_the_result_has_the_same_columns_whatever_happened(tmp_path: Path, plan: SweepPlan) -> None:
    with SweepJournal(tmp_path / "j") as journal:
        sweep = Sweep(plan, journal)
        sweep.failed = {point.key: "no luck" for point in plan.points}
        failed = table(sweep.rows())
    worker = SweepWorker(plan.job, tmp_path / "scratch")
    outcome = worker.run(plan.points[0])
    assert outcome.row is not None
    ok = table([outcome.row | plan.labels(plan.points[0]) | {"status": "ok"}])
    assert failed.schema == ok.schema
    assert set(Result.__annotations__) <= set(ok.columns)
    out = tmp_path / "r.parquet"
    write(pl.concat([ok, failed]), plan, str(out))
    assert json.loads(pl.read_parquet_metadata(out)[METADATA])["slots"] == [1, 2, 3]
    assert list(read_finished(str(out))) == [plan.points[0].key]  # the failed ones are run again


def test_another_file_is_no_result_to_resume_from(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    assert read_finished(str(out)) == {}
    pl.DataFrame({"a": [1]}).write_parquet(out)
    with pytest.raises(SimulationError, match="not the result of a sweep"):
        read_finished(str(out))
    out.write_text("hello")
    with pytest.raises(SimulationError, match="cannot be read"):
        read_finished(str(out))
    out = tmp_path / "r.json"
    out.write_text(json.dumps([{"key": "k", "status": "ok", "loads": 10**50}]))
    with pytest.raises(SimulationError, match="not the result of a sweep"):
        read_finished(str(out))


def row(policy: str, tokens_per_s: float, **more: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "trace_path": "t",
        "scope": "layer",
        "precision": "fp16",
        "expert_bytes": 10,
        "machine": "t4",
        "memory_bytes": None,
        "slots": 2,
        "policy": policy,
        "tokens_per_s": tokens_per_s,
        "time_is_lower_bound": False,
        "layer_bytes": 3,
        "token_bytes": 4,
        "needs_future": False,
        "lossy": False,
        "hit_ratio": 0.5,
        "loads": 10,
        "limit_loads": 5,
        "limit_tokens_per_s": 10.0,
        "share_of_limit": tokens_per_s / 10,
        "gap_closed_time": 0.25,
    } | more


def test_the_best_policy_is_one_that_could_run_and_changes_nothing() -> None:
    rows = [
        row("lru", 1.0),
        row("lfu", 2.0),
        row("belady", 9.0, needs_future=True),
        row("skip", 5.0, lossy=True),
        row("broken", 0.0, status="failed"),
        row("lru", 7.0, slots=4),
        row("skip", 3.0, machine="a100", lossy=True),
    ]
    found = best(rows)
    assert [(one["slots"], one["policy"], one["second"]) for one in found] == [
        (2, "lfu", "lru"),
        (4, "lru", None),
        (2, "skip", None),
    ]
    assert found[0]["clairvoyant_tokens_per_s"] == 9.0
    printed = table_of_best(found)
    assert "skip*" in printed
    assert "25.0" in printed  # of the gap
    assert "precision fp16" in printed  # the same throughout: said once
    assert len(to_csv(found).splitlines()) == 4
    assert json.loads(to_json(found)) == found


def test_with_a_budget_the_slots_are_the_winner_s() -> None:
    rows = [row("lru", 1.0, memory_bytes=100), row("lfu", 2.0, memory_bytes=100, slots=1)]
    (found,) = best(rows)
    assert (found["policy"], found["slots"]) == ("lfu", 1)
