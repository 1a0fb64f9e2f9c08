"""A policy that cannot run leaves its rows empty with the reason; the others are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from moepolicy import PolicyError, find_policy
from moepolicy.console import WrongUsage
from moeroute import TraceError, TraceWriter, open_trace
from moesim.errors import SimulationError, UsageError
from moesim.points import Points, same_figures
from moesim.simulation import check_needs, workload_for
from support.traces import write_trace

LATE = """
from moepolicy import Policy
class Late(Policy):
    def __init__(self, context):
        self.n = 0
    def victim(self, layer, incoming, candidates):
        self.n += 1
        return -7 if self.n > 40 else candidates[0]
"""
AHEAD = """
from moepolicy import Policy
class Ahead(Policy):
    requires = frozenset({"predictions"})
    horizon = 4
    def victim(self, layer, incoming, candidates):
        return candidates[0]
"""


def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *arguments]
    wide = os.environ | {"COLUMNS": "1000"}  # notes of any path stand in one line
    return subprocess.run(command, env=wide, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rows_stay_empty_and_the_reasons_stand_under_the_table(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    late = f"{tmp_path}/late.py:Late"
    options = ("--slots", "3,8", "--tokens", "60", "--no-limits")
    done = moesim("compare", late, "fiddler", "lru", *options)
    assert (done.returncode, done.stderr) == (1, "")
    cells = [line.split() for line in done.stdout.splitlines()]
    assert ["fiddler", "3"] in cells
    assert ["fiddler", "8"] in cells
    shown = "".join(done.stdout.split())  # the notes are wrapped, at a path's hyphens too
    for note in (
        f"{late}, 3 slots: could not run: policy '{late}' failed: victim named",
        "it answered -7",
        "fiddler, 3, 8 slots: could not run: policy 'fiddler' computes on CPU",
    ):
        assert "".join(note.split()) in shown
    rows = json.loads(moesim("compare", late, "lru", *options, "--format", "json").stdout)
    assert [(row["policy"], row["slots"], row["hits"] is None) for row in rows] == [
        (late, 3, True),
        ("lru", 3, False),
        (late, 8, False),
        ("lru", 8, False),
    ]
    assert [bool(row["refused"]) for row in rows] == [True, False, False, False]
    assert len({tuple(sorted(row)) for row in rows}) == 1


def test_a_command_fails_only_where_no_policy_could_run() -> None:
    done = moesim("compare", "fiddler", "hobbit", "--slots", "3", "--tokens", "60")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: none of the policies could run: policy 'fiddler'")
    assert "policy 'hobbit'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "code"), [("late", 1), ("unmade", 1), ("fiddler", 0), ("lru-spec", 0)]
)
def test_comparisons_and_sweeps_fail_where_a_policy_failed_not_where_it_lacks_something(
    tmp_path: Path, policy: str, code: int
) -> None:
    """lru-spec lacks the size of an expert, which says whether a prefetch arrives in time."""
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "unmade.py").write_text(LATE.replace("self.n = 0", "self.n = 1 // 0"))
    tiny, path = open_trace("tiny"), tmp_path / "unsized.parquet"
    with TraceWriter(path, replace(tiny.meta, expert_bytes={})) as writer:
        writer.write(tiny.rows(0, 60 * tiny.meta.n_layers))
    spec = f"{tmp_path}/{policy}.py:Late" if policy in ("late", "unmade") else policy
    options = ("lru", spec, "--trace", str(path), "--slots", "3", "--no-limits")
    compared = moesim("compare", *options, "--format", "json")
    rows = json.loads(compared.stdout)
    assert [bool(row["refused"]) for row in rows] == [False, True]
    swept = moesim("sweep", *options, "--out", str(tmp_path / "s.json"), "--workers", "1")
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert (compared.returncode, swept.returncode) == (code, code), swept.stderr


@pytest.mark.slow
def test_a_curve_leaves_out_what_has_none() -> None:
    done = moesim("curve", "lru", "fifo", "--trace", "tiny", "--format", "json")
    rows = json.loads(done.stdout)
    assert {row["policy"]: row["hit_ratio"] is None for row in rows} == {"lru": False, "fifo": True}
    assert {bool(row["refused"]) for row in rows if row["policy"] == "fifo"} == {True}
    shown = moesim("curve", "lru", "fifo", "--trace", "tiny")
    assert "fifo: no column: policy 'fifo' has no curve from one pass" in shown.stdout
    assert moesim("curve", "fifo", "--trace", "tiny").returncode == 2


def test_a_trace_with_fewer_horizons_than_declared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ahead.py").write_text(AHEAD)
    spec = find_policy(f"{tmp_path}/ahead.py:Ahead")
    trace = open_trace("tiny")
    said = r"ahead.py:Ahead' reads predictions 4 layers ahead, and the trace has predictions 3"
    with pytest.raises(TraceError, match=said):
        workload_for(trace, [spec])
    points = Points("t", "layer", "m")
    assert not points.admits(trace, spec)
    assert points.admits(trace, find_policy("lru-spec"))


def test_what_a_trace_lacks_is_named(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.parquet", [(0, 1, [[0], [1]])], 4)
    trace = open_trace(path)
    for name, column in (("lru-spec", "predicted_logits_1"), ("emoe-substitute", "router_logits")):
        with pytest.raises(TraceError, match=f"no column {column}, which policy '{name}' needs"):
            check_needs(trace, find_policy(name))


def test_what_is_wrong_for_every_policy_ends_the_comparison() -> None:
    def fails() -> None:
        raise UsageError("expert-bytes must be above 0")

    points = Points("t", "layer", "m")
    with pytest.raises(UsageError):
        points.run(find_policy("lru"), 2, fails)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([PolicyError("a"), SimulationError("b")], SimulationError),
        ([UsageError("a"), UsageError("b")], UsageError),
    ],
)
def test_none_that_ran_raises_every_reason(errors: list[Exception], kind: type[Exception]) -> None:
    points = Points("t", "layer", "m")
    for error in errors:
        points._errors.append(error)
    with pytest.raises(kind, match="none of the policies could run: a; b") as caught:
        points.compared(None)
    assert isinstance(caught.value, WrongUsage) == (kind is UsageError)


def test_policies_that_cannot_differ_are_told_together() -> None:
    context = workload_for(open_trace("tiny"), []).context(0, "layer")
    specs = [find_policy(name) for name in ("lru", "fifo", "least-stale")]
    assert same_figures(specs, context, [2, 4]) == [
        "fifo, least-stale at 2 slots cannot differ from lru: a layer has no more slots than a "
        "token has experts, and all else must go",
        "least-stale at 4 slots cannot differ from fifo: a pass comes to a layer once, and all "
        "that may go there is stale",
    ]
    assert same_figures(specs, context._replace(scope="global"), [4]) == []
