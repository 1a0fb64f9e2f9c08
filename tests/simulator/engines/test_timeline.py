"""Timelines: Chrome trace events that say what the simulated machine did."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from moepolicy import find_policy
from moeroute import open_trace
from moesim import load_workload, simulate
from moesim.engines.clock import Segment
from moesim.engines.timeline import write_timeline
from support.machines import NS, machine
from support.traces import decoded, write_trace


def near(value: float | None) -> Any:
    return pytest.approx(value, abs=NS / 2)


def events_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def test_the_lanes_show_every_copy_and_add_up(tmp_path: Path) -> None:
    nothing, guess = [float("nan")] * 4, [9.0, 0, 0, 0]
    trace = write_trace(
        tmp_path / "t.parquet",
        decoded([[0], [0]], [[0], [1]]),
        4,
        [nothing, guess, nothing, guess],
    )
    workload = load_workload(open_trace(trace), predictions=True)
    segments: list[Segment] = []
    result = simulate(
        workload,
        find_policy("lru-spec:n=1"),
        machine(chunk_bytes=5),
        slots=1,
        timeline=segments,
    )
    out = tmp_path / "out.json.gz"
    write_timeline(out, [("run", segments)], n_experts=4, expert_bytes=10, piece_bytes=5)
    events = events_of(out)
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {"compute", "copy stream 0", "copy stream 1"}
    copies = [e for e in events if e.get("cat") in ("demand", "prefetch")]
    assert sum(e["dur"] for e in copies) * 1e-6 == near(result.link_busy_s)
    assert {e["args"]["bytes"] for e in copies} == {5}
    guessed = [e for e in copies if e["cat"] == "prefetch"]
    assert {(e["args"]["layer"], e["args"]["expert"]) for e in guessed} == {(1, 0)}
    compute = [e for e in events if e.get("cat") in ("layer", "expert")]
    assert sum(e["dur"] for e in compute) * 1e-6 + result.stall_s == near(result.time_s)
    by_lane = defaultdict(list)
    for event in copies + compute:
        by_lane[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for lane in by_lane.values():
        ordered = sorted(lane)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(ordered))
