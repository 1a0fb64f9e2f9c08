"""Policies that cannot run live, or fail on the way: no figures, a reason, and the others stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moepolicy import PolicyError, find_policy
from moepolicy.outputs import Output
from moepolicy.refusals import Refusals
from moepolicy.tables import to_csv
from moerun.bench import report
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.routing import load_routing
from moerun.bench.run import Bench
from moerun.bench.schedule import BenchSchedule
from moerun.commands import fidelity as command
from moerun.policies import servable
from moerun.profiling import fidelity
from moerun.settings import Settings

MINE = """
from moepolicy import Policy
class Late(Policy):
    def __init__(self, context):
        self.n = 0
    def victim(self, layer, incoming, candidates):
        self.n += 1
        return -7 if self.n > 20 else candidates[0]
class Ahead(Policy):
    requires = frozenset({"predictions"})
    def __init__(self, context, horizon=2):
        pass
    def victim(self, layer, incoming, candidates):
        return candidates[0]
    def prefetch(self, step, keys):
        step.predicted[1]
        return 0
"""


@pytest.fixture
def late(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py:Late"


@pytest.mark.slow
def test_a_bench_keeps_the_others_figures(late: str, tmp_path: Path) -> None:
    refused: Refusals = {}
    ahead = late.replace("Late", "Ahead")
    asked = [find_policy(name) for name in (late, "lru", "belady", ahead, f"{ahead}:horizon=4")]
    schedule = BenchSchedule(servable(asked, refused), 4, 2, 2, released=False)
    model = GeneratedModel(find_config("tiny"), name="tiny", precision="fp32", seed=0)
    routing = load_routing("tiny", layers=8, experts=8, top_k=2, tokens=schedule.forced_tokens)
    schedule = schedule.within(routing, refused)
    with Bench(model, routing, Settings(policy=schedule.policies[0], slots=3), schedule) as bench:
        bench.results.refused.update(refused)
        bench.run()
        rows = report.rows_of(bench, {})
        shown = report.table_of(rows, report.provenance(bench))
        report.deliver(Output("json", tmp_path / "bench.json"), rows, report.provenance(bench))
    told = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row.policy for row in rows] == ["lru", ahead]
    assert [len(row.rounds) for row in rows] == [2, 2]
    reasons = {row["policy"]: row["refused"] for row in told}
    assert reasons["lru"] is reasons[ahead] is None
    assert "needs the future of a recorded trace" in reasons["belady"]
    assert "reads predictions 4 layers ahead, and routing 'tiny'" in reasons[f"{ahead}:horizon=4"]
    assert "victim named a negative key" in reasons[late]
    note = f"{late}: could not run: policy '{late}' failed: victim named"
    assert "".join(note.split()) in "".join(shown.split())  # wrapped, at a path's hyphens too
    assert len({tuple(row) for row in told}) == 1


def test_a_bench_of_which_nothing_is_left_fails(late: str) -> None:
    schedule = BenchSchedule((find_policy(late),), 4, 2, 1, released=False)
    model = GeneratedModel(find_config("tiny"), name="tiny", precision="fp32", seed=0)
    routing = load_routing("tiny", layers=8, experts=8, top_k=2, tokens=schedule.forced_tokens)
    with (
        Bench(model, routing, Settings(policy=schedule.policies[0], slots=3), schedule) as bench,
        pytest.raises(PolicyError, match="victim named a negative key that is not -1"),
    ):
        bench.run()


def test_none_that_can_be_served_is_an_error_with_every_reason() -> None:
    asked = [find_policy(name) for name in ("belady", "hobbit")]
    with pytest.raises(PolicyError, match=r"none of the policies could run: .*belady.*; .*hobbit"):
        servable(asked, {})


def test_a_fidelity_turn_leaves_out_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def run_live(_store: Any, settings: Settings, *_: Any) -> Any:
        ran.append(settings.policy.label)
        if settings.policy.label == "lfu":
            raise PolicyError("lfu lost count")
        return "a run"

    monkeypatch.setattr(fidelity, "run_live", run_live)
    policies = [find_policy(name) for name in ("lru", "lfu")]
    refused: Refusals = {}
    store: Any = None
    settings = Settings(policy=policies[0])
    runs = fidelity.LiveRuns(store, settings, policies, "", store, tmp_path, refused)
    for _ in range(2):
        turn: list[Any] = list(runs.turn())
        assert turn == ["a run", None]
    assert (ran, refused) == (["lru", "lfu", "lru"], {"lfu": "lfu lost count"})


def test_fidelity_shows_what_it_left_out() -> None:
    row = fidelity.Comparison("lru", 3, *(1.0,) * 10, live_runs=(1.0, 1.0), waited=0.0)
    shown = command._table([row], {"lfu": "lfu lost count"})
    assert "lfu: could not run: lfu lost count" in shown
    told = command._plain([row], {"lfu": "lfu lost count"})
    assert [(each["policy"], each["refused"], each["live_hits"]) for each in told] == [
        ("lru", None, 1.0),
        ("lfu", "lfu lost count", None),
    ]
    assert len(to_csv(told).splitlines()) == 3
