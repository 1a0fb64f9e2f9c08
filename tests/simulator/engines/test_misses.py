"""What each answer to a miss costs on the simulated machine, worked out by hand, and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moepolicy import Kind, find_policy
from moeroute import open_trace
from moesim import load_workload, simulate
from moesim.engines.names import Engine
from moesim.errors import SimulationError
from moesim.machine.profile import Cpu, Disk
from support.machines import NS, machine
from support.traces import decoded, write_trace

OWN = Path(__file__).parents[2] / "support" / "policies.py"
pytestmark = pytest.mark.parametrize("engine", ["simpy", "replay"])


def run(tmp_path: Path, engine: str, answer: Kind, *steps: list[int], **options: Any) -> Any:
    """One layer of 4 experts, 2 slots. Times: layer 5, copy 10 (low 4), expert 3."""
    path = write_trace(tmp_path / "t.parquet", decoded(*([experts] for experts in steps)), 4)
    on = replace(options.pop("on", machine()), cpu=Cpu(1, expert_s=7 * NS))
    return simulate(
        load_workload(open_trace(path)),
        find_policy(f"{OWN}:AnswersLow:answer={int(answer)}"),
        on,
        slots=2,
        low_bytes=4,
        engine=Engine(engine),
        **options,
    )


def test_what_is_skipped_takes_no_time(tmp_path: Path, engine: str) -> None:
    result = run(tmp_path, engine, Kind.SKIP, [0, 1], [2, 0])
    assert result.time_s == pytest.approx(10 * NS)
    assert (result.misses, result.loads, result.skipped) == (4, 0, 4)
    assert (result.skipped_share, result.bytes_loaded, result.lossy) == (1.0, 0, True)


def test_a_low_copy_brings_fewer_bytes(tmp_path: Path, engine: str) -> None:
    """5 | copies 5..9, 9..13 | 9..12, 13..16 | 21 hits 21..24, 24..27"""
    result = run(tmp_path, engine, Kind.LOW, [0, 1], [1, 0])
    assert result.time_s == pytest.approx(27 * NS)
    assert result.link_busy_s == pytest.approx(8 * NS)
    assert (result.loads, result.low_loads, result.bytes_loaded) == (2, 2, 8)
    assert (result.hits, result.low_share) == (2, 1.0)


def test_a_low_expert_is_read_from_disk_and_memory_at_its_own_size(
    tmp_path: Path, engine: str
) -> None:
    """Reading 2 bytes a ns, computing 1: layer 5, read 2, copy 4, compute 3 + 4."""
    on = machine(memory_bytes_per_s=1e9)
    on = replace(on, disk=Disk(bytes_per_s=2e9, host_bytes=0))
    result = run(tmp_path, engine, Kind.LOW, [0], on=on)
    assert result.time_s == pytest.approx((5 + 2 + 4 + 7) * NS)


def test_a_host_cache_holds_records_by_their_bytes(tmp_path: Path, engine: str) -> None:
    """9 bytes hold two low records: the third read puts the first out. No slot keeps any."""
    on = replace(machine(), disk=Disk(bytes_per_s=1e9, host_bytes=9))
    steps = [[0], [1], [0], [2], [1]]
    path = write_trace(tmp_path / "t.parquet", decoded(*([e] for e in steps)), 4)
    result = simulate(
        load_workload(open_trace(path)),
        find_policy(f"{OWN}:AnswersLow:answer={int(Kind.LOW)}"),
        replace(on, cpu=Cpu(1)),
        slots=0,
        low_bytes=4,
        engine=Engine(engine),
    )
    # Each step: layer 5, read 4 unless the host has it (step 2 only), copy 4, compute 3.
    assert result.time_s == pytest.approx((5 * (5 + 4 + 3) + 4 * 4) * NS)


def test_a_substitute_computes_after_the_hits_and_before_what_arrives(
    tmp_path: Path, engine: str
) -> None:
    """Step 2 wants 2 and 0: 0 (there) computes for itself and then for 2, and nothing travels."""
    timeline: list[Any] = []
    result = run(tmp_path, engine, Kind.SUBSTITUTE, [0, 1], [2, 0], timeline=timeline)
    # Nobody is there to stand in for the first two, which are loaded.
    assert (result.loads, result.substituted) == (2, 1)
    computed = [s.key for s in timeline if s.lane == 0 and s.key >= 0]
    assert computed == [0, 1, 0, 0]
    assert result.time_s == pytest.approx((5 + 10 + 10 + 3 + 5 + 3 + 3) * NS)
    assert result.substituted_share == pytest.approx(0.6 / 2)


def test_the_cpu_computes_beside_the_rest(tmp_path: Path, engine: str) -> None:
    result = run(tmp_path, engine, Kind.COMPUTE, [0, 1])
    assert result.time_s == pytest.approx((5 + 14) * NS)
    assert (result.cpu_experts, result.loads) == (2, 0)
    assert result.skipped_share == result.low_share == result.substituted_share == 0


def test_without_a_second_store_the_policy_is_refused_by_name(tmp_path: Path, engine: str) -> None:
    path = write_trace(tmp_path / "t.parquet", decoded([[0]]), 4)
    workload = load_workload(open_trace(path))
    with pytest.raises(SimulationError, match="'hobbit' loads experts at a lower precision"):
        simulate(workload, find_policy("hobbit"), machine(), slots=1, engine=Engine(engine))


@pytest.mark.slow
def test_the_command_says_what_a_policy_changed(engine: str) -> None:
    def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from moesim.cli import main; main()", "compare"]
        more = ("--slots", "3", "--tokens", "200", "--engine", engine)
        return subprocess.run(
            [*command, *arguments, *more], capture_output=True, text=True, timeout=120, check=False
        )

    done = moesim("hobbit", "lru", "--low", "2bit")
    assert done.returncode == 0, done.stderr
    assert "40,960 at the lower precision" in " ".join(done.stdout.split())  # lines are wrapped
    assert "hobbit, 3 slots: of the gates' weight" in done.stdout
    assert "lru, 3 slots: of" not in done.stdout
    rows = json.loads(moesim("hobbit", "--low-expert-bytes", "50000", "--format", "json").stdout)
    (row,) = rows
    assert row["low_loads"] > 0
    assert row["bytes_loaded"] == 50000 * row["low_loads"] + row["expert_bytes"] * (
        row["loads"] - row["low_loads"]
    )
    refused = moesim("hobbit", "--low-expert-bytes", "300000")
    assert refused.returncode == 1
    assert "no fewer than the" in refused.stderr
    both = moesim("hobbit", "--low-expert-bytes", "30", "--low", "2bit")
    assert both.returncode == 2
