"""A short piece of each campaign; the long ones run by hand (see docs/reliability.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stress import bad_files, policies, server
from stress.campaign import Campaign, jobs
from stress.faults import Faults
from stress.kills import Kills
from stress.limits import Limits
from stress.long import Long
from stress.pairs import Pairs
from stress.plans import Plans
from stress.powercuts import ORDERED, STRICT, Disk, Logged, PowerCuts
from stress.schedules import Schedules

SEED = 7

pytestmark = pytest.mark.slow


def test_wrong_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    todo = jobs(60, SEED, bad_files.SHARES)
    campaign = Campaign(tmp_path, SEED)
    campaign.run(todo, workers=1, minutes=20)
    assert campaign.faults == []
    assert {(each.case, each.number) for each in campaign.outcomes} == set(todo)
    assert Campaign(tmp_path, SEED).outcomes == campaign.outcomes  # what is done is not done again


def test_bad_policies_are_named_and_change_nothing(tmp_path: Path) -> None:
    todo = jobs(40, SEED, policies.SHARES, ("interpreted",))
    todo += jobs(3, SEED, policies.SHARES, ("live",))
    campaign = Campaign(tmp_path, SEED, "policies")
    campaign.run(todo, workers=1, minutes=20)
    assert campaign.faults == []
    assert {(each.case, each.number) for each in campaign.outcomes} == set(todo)


def test_long_runs_count_alike_and_stay_small(tmp_path: Path) -> None:
    """In a process of its own, which has no threads: a child that is forked from one with threads
    may wait for a lock that nobody holds."""
    options = ("--count", "2000", "--live-tokens", "400", "--piece", "400", "--minutes", "0.3")
    command = [sys.executable, "-m", "stress", "long", "--out", str(tmp_path), *options]
    done = subprocess.run(
        [*command, "--seed", str(SEED)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    campaign = Long(tmp_path, SEED)
    assert campaign.faults == []
    assert {ran.what.split()[0] for ran in campaign.outcomes} == {"simulated", "live"}


def test_killed_works_end_with_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    campaign = Kills(tmp_path, SEED)
    campaign.run(2, minutes=20, names=("export", "pack"))
    assert campaign.faults == []
    assert sum(ended.kills for ended in campaign.outcomes) >= 2


def test_a_plan_s_peak_is_within_its_budget(tmp_path: Path) -> None:
    campaign = Plans(tmp_path, SEED)
    campaign.run(2, minutes=20)
    assert campaign.faults == []
    assert len(campaign.outcomes) == 2


needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)


@needs_compiler
def test_calls_that_fail_are_refused_in_one_line_or_borne(tmp_path: Path) -> None:
    campaign = Faults(tmp_path, SEED)
    campaign.run(12, minutes=20, names=("export",))
    assert campaign.faults == []
    assert len(campaign.outcomes) == 12
    assert {failed.outcome for failed in campaign.outcomes} == {"refused", "borne"}


@needs_compiler
def test_power_cuts_leave_what_was_there_or_all_that_is_new(tmp_path: Path) -> None:
    campaign = PowerCuts(tmp_path, SEED)
    campaign.run(3, minutes=20, names=("fit",))
    assert campaign.faults == []
    assert sum(cut.resumed for cut in campaign.outcomes) == 3
    assert sum(not cut.resumed for cut in campaign.outcomes) > 20


@pytest.mark.parametrize(
    ("synced", "model", "left"),
    [
        ("nothing", ORDERED, {"new": b""}),
        ("nothing", STRICT, {"old": b"before"}),
        ("file", ORDERED, {"new": b"after"}),
        ("file", STRICT, {"old": b"before"}),
        ("file and folder", STRICT, {"new": b"after"}),
    ],
)
def test_the_disk_forgets_what_was_not_synced(
    tmp_path: Path, synced: str, model: str, left: dict[str, bytes]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"before")
    disk = Disk(root)

    def call(kind: str, name: str, other: str = "", at: int = 0, data: bytes = b"") -> None:
        path, second = str(root / name) if name else str(root), str(root / other) if other else ""
        flags = os.O_CREAT if kind == "opened" else len(data)
        disk.apply(Logged(1, kind, at, flags, path, second, data))

    call("opened", "temporary", at=3)
    call("write", "temporary", data=b"after")
    if "file" in synced:
        call("fsync", "temporary")
    call("rename", "temporary", "new")
    call("unlink", "old")
    if "folder" in synced:
        call("fsync", "")
    disk.leave(tmp_path / "left", model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "left").iterdir()} == left


def test_random_schedules_compute_from_the_right_records(tmp_path: Path) -> None:
    campaign = Schedules(tmp_path, SEED)
    campaign.run(40, minutes=20)
    assert campaign.faults == []
    assert len(campaign.outcomes) == 40
    assert sum(ran.resizes for ran in campaign.outcomes) > 40


def test_two_processes_on_one_output_do_not_mix(tmp_path: Path) -> None:
    campaign = Pairs(tmp_path, SEED)
    campaign.run(2, minutes=20, names=("import npz", "pack"))
    assert campaign.faults == []


def test_a_limit_of_memory_is_told_in_one_line(tmp_path: Path) -> None:
    """Of a command without polars, which may wait for ever where it gets no memory."""
    campaign = Limits(tmp_path, SEED)
    campaign.run(3, minutes=20, names=("pack",))
    assert campaign.faults == []


def test_a_server_under_load_loses_no_request(tmp_path: Path) -> None:
    seen, figures = server.run(tmp_path, SEED, minutes=0.25, crowd=0)
    assert seen.faults == []
    assert figures["answered"]
    assert figures["refused"]
