"""Policies that fail in `moerun`: what is told, what is written, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.commands import Call

SUPPORT = Path(__file__).parents[2] / "support"
FAILING = f"{SUPPORT / 'failing.py'}:Failing:hook=victim,at=30"
PROMPT = "Once upon a time there was a"
RUN = ("--prompt", PROMPT, "--slots", "3", "--max-new-tokens", "8")


def test_generation_goes_on_and_the_exit_code_tells(moerun: Call, tmp_path: Path) -> None:
    expected = moerun(*RUN)
    assert expected.returncode == 0
    journal, trace = tmp_path / "j.json", tmp_path / "t.parquet"
    done = moerun(*RUN, "--policy", FAILING, "--journal", str(journal), "--record", str(trace))
    assert done.returncode == 1
    assert done.stdout == expected.stdout
    told, *rest = [line for line in done.stderr.splitlines() if "interpreted" not in line]
    assert "my victim failed (victim, step " in told
    assert f"{SUPPORT / 'failing.py'}:" in told
    assert told.endswith("from this step on, LRU keeps the experts")
    assert f"{journal} is not written: no journal can repeat a run whose policy failed" in rest
    assert "failed" in " ".join(rest)
    assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_a_row_has_what_failed_and_how_long_decisions_took(moerun: Call) -> None:
    done = moerun(*RUN, "--policy", FAILING, "--format", "json")
    row = json.loads(done.stdout)
    assert done.returncode == 1
    assert "my victim failed" in row["policy_failure"]
    assert row["new_tokens"] == 8
    assert 0 < row["decide_s"] < row["time_s"]
    well = json.loads(moerun(*RUN, "--format", "json").stdout)
    assert well["policy_failure"] is None
    assert well["text"] == row["text"]


def test_generation_stops_where_it_is_told_to(moerun: Call, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    options = ("--policy", FAILING, "--on-policy-error", "stop", "--record", str(trace))
    done = moerun(*RUN, *options)
    assert done.returncode == 1
    [told] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "my victim failed (victim, step " in told
    assert "LRU" not in done.stderr
    assert not [*tmp_path.iterdir()]


def test_there_are_two_answers_to_an_error(moerun: Call) -> None:
    done = moerun(*RUN, "--on-policy-error", "retry")
    assert done.returncode == 2
    assert "error: --on-policy-error must be 'fallback' or 'stop', not 'retry'" in done.stderr


def test_a_warning_among_streamed_text_begins_a_line_of_its_own() -> None:
    program = "from moepolicy.console import emit, say; emit('the text'); say('a warning'); "
    program += "say('another'); emit(' goes on'); emit('\\n'); say('the end')"
    run = partial(subprocess.run, [sys.executable, "-c", program], text=True, check=True)
    mixed = run(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert mixed.stdout == "the text\na warning\nanother\n goes on\nthe end\n"
    apart = run(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert apart.stdout == "the text goes on\n"
    assert apart.stderr == "a warning\nanother\nthe end\n"


@pytest.mark.slow
def test_a_failed_policy_is_told_on_a_line_of_its_own(home: Path) -> None:
    program = [sys.executable, "-c", "from moerun.cli import main; main()"]
    done = subprocess.run(
        [*program, *RUN, "--policy", FAILING],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
    )
    assert done.returncode == 1
    [told] = [line for line in done.stdout.splitlines() if "from this step on, LRU" in line]
    assert told.startswith("policy ")


@pytest.mark.parametrize("answer", ["fallback", "stop"])
def test_a_chat_goes_on_under_lru(moerun: Call, answer: str) -> None:
    options = ("--slots", "3", "--max-new-tokens", "6", "--policy", FAILING)
    said = "hello\nand again\n"
    done = moerun("chat", *options, "--on-policy-error", answer, stdin=said)
    assert done.returncode == 1
    assert "my victim failed (victim, step " in done.stderr
    assert ("LRU keeps the experts" in done.stderr) is (answer == "fallback")
    assert done.stderr.count("tokens/s, ") == (2 if answer == "fallback" else 0)


@pytest.mark.slow
def test_what_routing_changed_is_printed(moerun: Call) -> None:
    policy = ("--policy", f"{SUPPORT / 'routing.py'}:ToResidents:bias=2.0")
    done = moerun(*RUN, *policy)
    assert done.returncode == 0, done.stderr
    assert "changed   of the gates' weight" in done.stderr
    assert "% routed to another expert" in " ".join(done.stderr.split())
    assert "by the policy and the state machine" in " ".join(done.stderr.split())
    row = json.loads(moerun(*RUN, *policy, "--format", "json").stdout)
    assert row["rerouted"] > 0
    assert 0 < row["rerouted_share"] < 1
