"""The command as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moesim.machine.profile import load_machine
from support.traces import decoded, write_trace

# What every row of JSON and CSV must have (the project's first issue fixes these names).
COLUMNS = {
    "policy",
    "slots",
    "scope",
    "machine",
    "steps",
    "requests",
    "hits",
    "late",
    "misses",
    "loads",
    "bypasses",
    "prefetches",
    "useless_prefetches",
    "bytes_loaded",
    "hit_ratio",
    "time_s",
    "stall_s",
    "tokens_per_s",
    "limit_loads",
    "lossy",
}


def moesim(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_compare_with_nothing_else_prints_a_table() -> None:
    done = moesim("compare", "lru", "belady")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert all(line.startswith("compiling the simulator") for line in said)  # the first time
    shown = " ".join(done.stdout.split())
    # At 2 slots both are alike, and on the default machine copies of the bundled model are hidden.
    assert "Chosen: slots 3, 4, 6, because there belady hits" in shown
    assert re.search(r"Simulated on (\S+) .*; machine \1, because", shown)
    rows = [line for line in done.stdout.splitlines() if line.startswith("belady ")]
    assert [row.split()[1] for row in rows] == ["3", "4", "6"]
    assert "limit: the fewest loads and the least time" in done.stdout
    assert shown.endswith("of the most tokens/s that any policy could reach.")


def test_json_and_csv_rows_agree_and_have_the_promised_names(tmp_path: Path) -> None:
    options = ["compare", "lru", "lru-spec:n=1", "--slots", "4", "--machine", "t4"]
    rows = json.loads(moesim(*options, "--format", "json").stdout)
    assert [row["policy"] for row in rows] == ["lru", "lru-spec:n=1"]
    assert set(rows[0]) >= COLUMNS
    out = tmp_path / "rows.csv"
    done = moesim(*options, "--format", "csv", "--out", out)
    assert (done.returncode, done.stdout) == (0, "")
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    # What is null in JSON is empty in CSV: the precision of tiny's dense weights is not recorded.
    told = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert told == table
    assert list(tmp_path.iterdir()) == [out]
    for row in rows:
        assert row["hits"] + row["late"] + row["misses"] == row["requests"]
        assert row["bytes_loaded"] == row["loads"] * row["expert_bytes"]
        assert row["kind"] == "simulated"


@pytest.mark.slow
def test_policies_count_experts_in_the_calibration_trace(tmp_path: Path) -> None:
    """One slot: by its own counts it is expert 0's, by the other trace's expert 1's."""
    trace = write_trace(tmp_path / "t.parquet", decoded([[0]], [[1]], [[0]], [[1]], [[0]]), 3)
    other = write_trace(tmp_path / "o.parquet", decoded([[1]], [[1]], [[0]]), 3)

    def hits(*options: str | Path) -> Any:
        run = ("compare", "static", "--trace", trace, "--slots", "1", "--format", "json", *options)
        (row,) = json.loads(moesim(*run).stdout)
        return row["hits"]

    assert hits() == 2
    assert hits("--calibration", other) == 1
    assert hits("--calibration", other, "--tokens", "3") == 0
    refused = moesim("compare", "static", "--trace", trace, "--calibration", "tiny")
    assert refused.returncode == 1
    assert "1 of 3: give --calibration a trace of the same model" in refused.stderr


@pytest.mark.slow
def test_scope_and_size_change_what_is_simulated() -> None:
    def row(*options: str) -> dict[str, Any]:
        found = json.loads(moesim("compare", "lru", "--format", "json", *options).stdout)
        assert len(found) == 1
        first: dict[str, Any] = found[0]
        return first

    small = row("--slots", "4", "--expert-bytes", "1000")
    large = row("--slots", "4", "--expert-bytes", "0.1GB")
    assert (small["expert_bytes"], large["expert_bytes"]) == (1000, 100_000_000)
    assert small["hits"] == large["hits"]
    assert small["tokens_per_s"] > large["tokens_per_s"]
    assert row("--slots", "4", "--scope", "global")["hits"] != small["hits"]


def test_a_sample_by_name_says_that_it_is_synthetic() -> None:
    done = moesim("compare", "lru", "--trace", "mixtral-like", "--slots", "4")
    assert done.returncode == 0, done.stderr
    assert "(synthetic)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compare", "lur"], 2, "unknown policy 'lur'; did you mean 'lru'? `moesim policies`"),
        (["compare", "lru", "--machine", "t5"], 2, "unknown machine 't5'; did you mean 't4'?"),
        (["compare", "lru", "--trace", "absent.parquet"], 1, "absent.parquet: there is no such"),
        (["compare", "lru", "--precision", "7bit"], 1, "no size for precision '7bit'; it has"),
        (["compare", "lru", "--expert-bytes", "0"], 2, "error: --expert-bytes must be above 0"),
        (["compare", "lru", "--expert-bytes", "big"], 2, "--expert-bytes: 'big' is no amount"),
        (["compare", "hobbit", "--low-expert-bytes", "1.5"], 2, "--low-expert-bytes: '1.5' is no"),
        (["compare", "lru", "--scope", "both"], 2, "unknown scope 'both'"),
        (["compare", "lru", "--slots", "few"], 2, "--slots is 'few', not whole numbers"),
        (["compare", "lru", "--slots", "-1"], 2, "give numbers of 0 or more"),
        (["compare", "lru", "--format", "xml"], 2, "'xml' is not one of"),
        (["compare"], 2, "name a policy or more, or give --all"),
        (["compare", "lru", "--out", "absent/rows.csv"], 1, "the folder absent does not exist"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: list[str], code: int, says: str) -> None:
    done = moesim(*arguments)
    assert done.returncode == code
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error: "):
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_a_machine_so_slow_that_its_clock_would_overflow_is_named(tmp_path: Path) -> None:
    profile = tmp_path / "slow.toml"
    profile.write_text("[link]\nbytes_per_s = 1e-9\n")
    done = moesim("compare", "lru", "--machine", profile, "--tokens", "20", "--slots", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: machine 'slow' is so slow that 160 steps may take 100 ")
    assert done.stderr.count("\n") == 1


def test_a_truncated_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    done = moesim("compare", "lru", "--trace", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1


def test_a_policy_that_needs_predictions_names_the_column(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "plain.parquet", decoded([[0]], [[1]]), 2)
    done = moesim("compare", "lru-spec", "--trace", path, "--slots", "1")
    assert done.returncode == 1
    assert "no column predicted_logits_1, which policy 'lru-spec' needs" in done.stderr


def test_every_help_names_its_options() -> None:
    text = moesim("compare", "--help").stdout
    for option in ("--trace", "--slots", "--scope", "--machine", "--precision", "--expert-bytes"):
        assert option in text
    assert "lru-spec" in moesim("policies").stdout
    assert "rtx3060" in moesim("machines").stdout
    machines = json.loads(moesim("machines", "--format", "json").stdout)
    (found,) = (one for one in machines if one["machine"] == "rtx3060")
    assert found["link_bytes_per_s"] == load_machine("rtx3060").link.bytes_per_s
    assert (found["source"], found["disk_bytes_per_s"]) == ("published", None)


@pytest.mark.parametrize("engine", ["replay", "simpy"])
@pytest.mark.parametrize(
    ("code", "kind"), [("self.seen[incoming]", "KeyError: "), ("None + 1", "TypeError: ")]
)
def test_a_policy_that_breaks_is_named_with_its_line(
    tmp_path: Path, engine: str, code: str, kind: str
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from moepolicy import Policy\n\n\nclass Mine(Policy):\n"
        "    def __init__(self, context):\n        self.seen = {}\n\n"
        f"    def victim(self, layer, incoming, candidates):\n        return {code}\n"
    )
    done = moesim("compare", f"{mine}:Mine", "--slots", "2", "--tokens", "64", "--engine", engine)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"failed: {kind}" in done.stderr
    assert f"(victim, step 8, {mine}:9)" in done.stderr
