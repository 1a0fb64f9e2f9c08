"""Curves from one pass, against the state machine at every size; the command that prints them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Kind
from moeroute import open_trace
from moesim import SimulationError, Workload, load_workload
from moesim.curves import hit_ratios
from moesim.curves.hit_ratios import ONE_PASS, hit_curve, shuffled
from moesim.limits import min_loads
from support.clock import drive
from support.workloads import make_workload

N_EXPERTS = 5


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Up to three layers; most steps want one or two experts, some as many as there are."""
    n_layers = draw(st.integers(1, 3))
    order = st.permutations(range(N_EXPERTS))
    width = st.sampled_from([1, 2, 2, 3, N_EXPERTS])
    n = draw(st.integers(1, 14))
    demands = [(i % n_layers, draw(order)[: draw(width)]) for i in range(n)]
    return make_workload(demands, n_layers, N_EXPERTS)


def hits_of(policy: str, workload: Workload, slots: int, scope: str) -> int:
    steps = [workload.step(i) for i in range(workload.n_steps)]
    run, _ = drive(policy, workload.context(slots, scope), steps)
    return run.count(Kind.HIT)


@pytest.mark.parametrize("policy", ONE_PASS)
@given(workload=workloads(), scope=st.sampled_from(["layer", "global"]))
@settings(max_examples=60, deadline=None)
def test_one_pass_gives_the_hits_of_every_size(policy: str, workload: Workload, scope: str) -> None:
    curve = hit_curve(workload, policy, scope)
    counted = [hits_of(policy, workload, slots, scope) for slots in range(N_EXPERTS + 1)]
    assert (curve * len(workload.keys)).round().astype(int).tolist() == counted
    if policy == "belady-bypass":
        limits = [min_loads(workload, slots, scope) for slots in range(N_EXPERTS + 1)]
        assert [len(workload.keys) - hits for hits in counted] == limits


@given(workload=workloads(), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_shuffled_trace_has_the_same_passes(workload: Workload, seed: int) -> None:
    def passes(of: Workload) -> list[tuple[object, ...]]:
        steps = [of.step(i) for i in range(of.n_steps)]
        found: dict[int, list[object]] = {}
        for row, step in zip(of.rows[:, 0].tolist(), steps, strict=True):
            found.setdefault(row, []).append((step.layer, *step.experts, *step.weights))
        return [(row, *of_pass) for row, of_pass in found.items()]

    again = shuffled(workload, seed)
    assert sorted(map(str, passes(again))) == sorted(map(str, passes(workload)))
    assert np.array_equal(shuffled(workload, seed).keys, again.keys)


@pytest.mark.parametrize("together", [1, 3])
def test_a_trace_is_shuffled_alike_however_much_of_it_is_read_together(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = load_workload(open_trace("tiny")).head(40)
    expected = shuffled(workload, 5)
    monkeypatch.setattr(hit_ratios, "SCATTERED", together)
    found = shuffled(workload, 5)
    for name in ("keys", "weights", "routed", "offsets", "layer", "decode", "rows", "starts"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_a_policy_without_a_stack_is_named() -> None:
    with pytest.raises(SimulationError, match=r"'fifo' has no curve from one pass; .*there are"):
        hit_curve(make_workload([(0, [0])], 1, 2), "fifo", "layer")


def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_command_prints_every_size_beside_the_shuffled_trace_and_the_limit() -> None:
    done = moesim("curve", "lru", "belady", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["policy"], row["slots"]) for row in rows] == [
        (policy, slots) for policy in ("lru", "belady") for slots in range(1, 9)
    ]
    for row in rows:
        assert row["hit_ratio"] <= row["limit_hit_ratio"]
        assert (row["kind"], row["scope"], row["seed"]) == ("simulated", "layer", 0)
    # The bundled model's routing repeats itself: order matters until everything fits.
    lru = {row["slots"]: row for row in rows if row["policy"] == "lru"}
    assert lru[4]["hit_ratio"] > lru[4]["shuffled_hit_ratio"] + 0.02
    assert lru[8]["hit_ratio"] == pytest.approx(lru[8]["shuffled_hit_ratio"])
    table = moesim("curve", "lru", "belady", "--format", "csv")
    assert [float(row["hit_ratio"]) for row in csv.DictReader(io.StringIO(table.stdout))] == [
        row["hit_ratio"] for row in rows
    ]
    assert "shuffled" in moesim("curve", "lru").stdout


def test_the_command_names_a_mistake() -> None:
    done = moesim("curve", "lur")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'lur' has no curve from one pass; did you mean 'lru'?" in done.stderr
    assert "Traceback" not in done.stderr
