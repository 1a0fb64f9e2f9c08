"""The command as a user meets it: its output and its exit codes.

Runs go through the entry point in this process, for each new process imports torch again.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from moepolicy.tables import Format
from moerun.live.report import Report, render
from moerun.profiling.fidelity import Comparison
from support.commands import PROMPT, Call, error_line


def test_json_has_the_row_the_text_and_what_made_it(moerun: Call) -> None:
    done = moerun("--format", "json", "--max-new-tokens", "6", "--slots", "2", stdin=f"{PROMPT}\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "measured"
    assert found["new_tokens"] == 6
    assert found["hits"] + found["late"] + found["misses"] == found["requests"]
    assert found["loads"] * 196608 == found["bytes_loaded"]
    assert found["arena_bytes"] == (8 * 2 + 1) * 196608
    assert found["peak_host_bytes"] > found["arena_bytes"]
    assert found["packages"]["torch"]
    assert found["text"]


def test_the_prompt_may_come_from_a_file(moerun: Call, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    texts = [
        moerun("--max-new-tokens", "5", *source).stdout
        for source in (("--prompt-file", path), ("--prompt", PROMPT))
    ]
    assert texts[0] == texts[1] != ""


def test_generate_is_what_options_without_a_command_are_for(moerun: Call) -> None:
    options = ("--policy", "lru-spec", "--slots", "3", "--max-new-tokens", "6", "--prompt", PROMPT)
    named, short = moerun("generate", *options), moerun(*options)
    assert named.returncode == short.returncode == 0, named.stderr
    assert named.stdout == short.stdout != ""


def test_the_text_ends_before_a_stop_string(moerun: Call) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "30", "--format", "json")
    whole = json.loads(moerun(*arguments).stdout)
    stop = whole["text"].split()[4]
    cut = json.loads(moerun(*arguments, "--stop", stop, "--stop", "@@").stdout)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["new_tokens"] < whole["new_tokens"]
    assert cut["sampling"]["stop_strings"] == [stop, "@@"]


def test_a_text_that_fills_the_context_says_so(moerun: Call) -> None:
    prompt = ("--prompt", "word " * 490)
    done = moerun(*prompt, "--max-new-tokens", "5000", "--slots", "9", "--format", "json")
    assert done.stderr == "the text ends here: the context of 512 tokens is full\n"
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] + found["new_tokens"] == 512
    # A layer has 8 experts: no memory is taken for more.
    assert found["slots"] == 8
    assert found["arena_bytes"] == (8 * 8 + 1) * 196608
    assert "context" not in moerun("--prompt", PROMPT, "--max-new-tokens", "2").stderr


def test_what_has_no_value_yet_is_left_out_of_the_table() -> None:
    nothing: dict[str, Any] = {
        **{field.name: 0 for field in fields(Report)},
        **{"policy": "lru", "disk_reads": None, "peak_device_bytes": None, "interrupted": True},
    }
    idle = render(Report(**nothing), Format.table, "", {}).splitlines()
    assert [line.split()[0] for line in idle] == ["policy", "memory", "tokens"]
    assert idle[-1] == "tokens    0 prompt, 0 new (interrupted)"
    reading = Report(**nothing | {"prompt_tokens": 5, "requests": 4, "hits": 4, "stall_s": 0.5})
    table = render(reading, Format.table, "", {})
    assert "stall     0.50 s waiting for experts\n" in table
    assert "tokens/s" not in table
    spoken = render(replace(reading, prompt_tokens_per_s=2.0), Format.table, "", {})
    assert "speed     2.00 tokens/s reading the prompt\n" in spoken


def test_policies_are_listed_with_which_run_live(moerun: Call) -> None:
    done = moerun("policies")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "  yes  " in lines["lru-spec"]
    assert "no, needs future" in lines["belady"]
    assert "lossy  yes, with --low" in lines["hobbit"]
    rows = {row["policy"]: row for row in json.loads(moerun("policies", "--format", "json").stdout)}
    assert (rows["belady"]["runs_live"], rows["belady"]["why"]) == (False, "needs future")
    assert (rows["hobbit"]["runs_live"], rows["hobbit"]["why"]) == (True, "with --low")
    assert not rows["lru"]["why"]
    told = moerun("policies", "clairvoyant").stdout
    assert "runs live   no, needs future\n" in told
    assert moerun("policies", "lruu").returncode == 2


def test_a_second_store_is_packed_and_what_it_changed_is_said(moerun: Call) -> None:
    options = ("--policy", "hobbit", "--prompt", PROMPT, "--slots", "2", "--max-new-tokens", "8")
    done = moerun(*options, "--low", "2bit")
    assert done.returncode == 0, done.stderr
    assert "changed   of the gates' weight" in done.stderr
    assert "% computed at the lower precision" in done.stderr
    row = json.loads(moerun(*options, "--low", "2bit", "--format", "json").stdout)
    assert row["low_loads"] > 0
    assert 0 < row["low_share"] < 1
    assert row["lossy"]


def test_packing_by_hand_and_running_the_store(moerun: Call, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = moerun("pack", "tiny", "--out", out, "--precision", "4bit")
    assert done.returncode == 0, done.stderr
    assert "8 layers of 8 experts in 4bit" in done.stdout
    again = error_line(moerun("pack", "tiny", "--out", out))
    assert f"{out} exists already" in again
    run = moerun("--model", out, "--prompt", PROMPT, "--max-new-tokens", "4")
    assert run.returncode == 0, run.stderr
    wrong = moerun("--model", out, "--precision", "2bit", "--prompt", PROMPT)
    assert f"the experts in {out} are 4bit, not 2bit" in error_line(wrong)


@pytest.mark.slow
def test_a_profile_is_what_moesim_reads(moerun: Call, tmp_path: Path) -> None:
    from moesim.machine.profile import load_machine

    out = tmp_path / "here.toml"
    done = moerun("profile", "--out", out, "--link-gbps", "0.5", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    machine = load_machine(str(out))
    assert (machine.name, machine.source) == ("here", "measured")
    assert machine.link.bytes_per_s == 0.5e9
    assert machine.link.back_to_back
    # Only what no other program can bring down to nothing; test_profile.py has the arithmetic.
    assert machine.compute.expert_s > 0
    assert machine.cpu is not None
    assert machine.cpu.expert_s > 0
    assert "tiny" in machine.description


def test_fidelity_keeps_its_rows_in_a_file(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Comparison("lru", 2, *(0.25,) * 10, live_runs=(9.0, 10.0), waited=0.0)
    compare = Mock(return_value=[row])
    monkeypatch.setattr("moerun.profiling.fidelity.compare", compare)
    out = tmp_path / "rows.json"
    done = moerun("fidelity", "lru", "belady", "--out", out)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    rows = json.loads(out.read_text())
    assert [(each["policy"], bool(each["refused"])) for each in rows] == [
        ("lru", False),
        ("belady", True),
    ]
    again = moerun("fidelity", "lru", "--out", out)
    assert f"{out} exists already" in error_line(again)
    assert compare.call_count == 1  # the second was refused before anything ran
    assert moerun("fidelity", "lru", "--out", out, "--force").returncode == 0


@pytest.mark.slow
def test_fidelity_has_live_next_to_simulated(moerun: Call, tmp_path: Path) -> None:
    done = moerun(
        *("fidelity", "lru", "lru-spec", "static", "--rounds", "1", "--max-new-tokens", "16"),
        *("--link-gbps", "0.5", "--slots", "3", "--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["policy"] for row in rows] == ["lru", "lru-spec", "static"]
    lru, spec, static = rows
    for row in (lru, static):  # without prefetching the decisions do not depend on the clock
        assert row["live_hits"] == row["simulated_hits"]
        assert row["live_misses"] == row["simulated_misses"]
    for row in rows:
        assert row["live_tokens_per_s"] > 0
        assert row["simulated_tokens_per_s"] > 0
    total = spec["live_hits"] + spec["live_late"] + spec["live_misses"]
    assert total == pytest.approx(1)
    named = moerun(
        *("fidelity", "lru", "--rounds", "1", "--max-new-tokens", "4", "--machine", "t4"),
        *("--slots", "3", "--format", "json"),
    )
    assert named.returncode == 0, named.stderr
    assert json.loads(named.stdout)[0]["simulated_tokens_per_s"] > 0
    refused = moerun("fidelity", "belady", "--rounds", "1")
    assert "needs the future" in error_line(refused)
