"""How long a copy takes against a layer, worked out by hand, and who is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from moepolicy import PolicySpec
from moepolicy.library.recency.lru import Lru
from moesim import Machine, SimulationError, Workload, simulate
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import Compute, Disk, LinkProfile
from moesim.machine.speed import copy_over_layer, gates_over_layer
from support.workloads import make_workload

NS = 1e-9
BY_HAND = Machine(
    "by hand",
    "",
    "published",
    LinkProfile(1e9, latency_s=7 * NS, chunk_bytes=40),
    Compute(layer_s=20 * NS, gate_sync_s=5 * NS, prefetch_s=1.0, expert_s=3 * NS),
    disk=Disk(1.0),
)
SIZES = Sizes(100, 50, 30, None, low_bytes=25)


def test_the_ratio_by_hand() -> None:
    """Copy: 7 + 40 + 40 + 20 ns. Layer: 20 + 5 ns and three experts of 3 ns. With weights read at
    10 bytes/ns: 3 ns more, and experts of 3 + 10."""
    assert copy_over_layer(BY_HAND, SIZES, 3) == 107 / 34
    reading = replace(BY_HAND.compute, memory_bytes_per_s=1e10)
    assert copy_over_layer(replace(BY_HAND, compute=reading), SIZES, 3) == 107 / (28 + 3 * 13)
    assert gates_over_layer(BY_HAND, SIZES, 3) == 1e9 / 34
    whole = replace(BY_HAND, link=LinkProfile(1e9))
    assert copy_over_layer(whole, SIZES, 1) == 100 / 28


def test_what_is_unknown_is_no_number() -> None:
    unknown = replace(SIZES, layer_bytes=None)
    assert copy_over_layer(BY_HAND, unknown, 3) == 107 / 34  # nothing is read at a rate
    reading = replace(BY_HAND, compute=Compute(memory_bytes_per_s=1e10))
    assert math.isnan(copy_over_layer(reading, unknown, 3))
    assert math.isinf(copy_over_layer(replace(BY_HAND, compute=Compute()), SIZES, 3))


def workload() -> Workload:
    return make_workload([(0, (0, 1)), (1, (2, 3))] * 3, 2, 4)


def test_the_ratio_is_of_the_costs_that_engines_count_with() -> None:
    costs = costs_of(workload(), BY_HAND, SIZES, predicting=False)
    copy_ns = costs.latency_ns + (costs.n_pieces - 1) * costs.piece_ns + costs.last_piece_ns
    layer_ns = costs.layer_ns[1] + 2 * costs.expert_ns[1]
    assert copy_over_layer(BY_HAND, SIZES, 2) == copy_ns / layer_ns


@pytest.mark.parametrize("cold", [False, True])
def test_a_simulated_policy_is_told(cold: bool) -> None:
    seen: list[tuple[Any, ...]] = []

    class Asking(Lru):
        requires = frozenset({"speed", "bytes"})

        def __init__(self, context: Any) -> None:
            super().__init__(context)
            seen.append((context.copy_over_layer, context.expert_bytes, context.low_bytes))

    spec = PolicySpec("asking", Asking)
    on = replace(BY_HAND, link=LinkProfile(1e9))
    simulate(workload(), spec, on, slots=1, expert_bytes=10, low_bytes=4, cold=cold)
    assert set(seen) == {(10 / (25 + 2 * 3), 10, 4)}
    meta = replace(workload().meta, expert_bytes={})
    with pytest.raises(SimulationError, match="'asking' needs the bytes of an expert: nothing"):
        simulate(workload().sized(meta), spec, on, slots=1)
    reading = replace(on, compute=Compute(memory_bytes_per_s=1e9))
    with pytest.raises(SimulationError, match="how big a layer's dense weights are; give --like"):
        simulate(workload(), spec, reading, slots=1)


def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_machines_prints_the_ratio() -> None:
    sizes = ("--expert-bytes", "1000000", "--expert-params", "500000", "--top-k", "4")
    dense = ("--dense-layer-bytes", "2000000")
    (row,) = json.loads(moesim("machines", "t4", *sizes, *dense, "--format", "json").stdout)
    assert row["copy_over_layer"] == pytest.approx(row["copy_s"] / row["layer_s"])
    (without,) = json.loads(moesim("machines", "t4", *sizes, "--format", "json").stdout)
    assert without["copy_s"] == row["copy_s"]
    assert without["layer_s"] is without["copy_over_layer"] is None
    done = moesim("machines", "--top-k", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give --expert-bytes" in done.stderr
