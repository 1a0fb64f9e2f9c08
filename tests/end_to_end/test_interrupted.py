"""A policy that never returns is named, and Ctrl-C ends its run, wherever the loop is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from moepolicy import console
from moepolicy.overdue import Watch

POLICY = '''
import numpy as np
from moepolicy import Policy


class Endless(Policy):
    """Goes on for ever once it was asked so often."""

    def __init__(self, context, after=0):
        self.after = after
        self.asked = np.zeros(1, np.int64)

    def victim(self, layer, incoming, candidates):
        self.asked[0] += 1
        while self.asked[0] > self.after:
            self.asked[0] += 1
        return candidates[0]


class Deaf(Endless):
    """The same, and hears no exception."""

    def victim(self, layer, incoming, candidates):
        while True:
            try:
                while True:
                    self.asked[0] += 1
            except BaseException:
                pass


class Unmade(Policy):
    """Never comes to be."""

    def __init__(self, context):
        while True:
            self.asked = 0

    def victim(self, layer, incoming, candidates):
        return candidates[0]
'''
# The program with less patience than a person has.
PROGRAM = """
import sys
import moepolicy.overdue as overdue
overdue.OVERDUE_S, overdue.HEARD_S, overdue.TICK_S = 1.0, 1.0, 0.1
from {program}.cli import main
main()
"""
LIVE = ("moerun", "--slots", "2", "--max-new-tokens", "20", "--prompt", "Once upon a time")


def interrupted(folder: Path, program: str, *arguments: str) -> list[str]:
    """What a run says on stderr that is interrupted once it is said to be overdue."""
    (folder / "mine.py").write_text(POLICY)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(program=program), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line.rstrip())
        if "has not returned" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=60)
    said += rest.splitlines()
    assert process.returncode == console.INTERRUPTED, said
    assert "Traceback" not in rest
    return said


@pytest.mark.parametrize(
    ("policy", "hook"),
    [
        pytest.param("mine.py:Endless", "victim", marks=pytest.mark.slow),
        ("mine.py:Deaf", "victim"),
        pytest.param("mine.py:Unmade", "__init__", marks=pytest.mark.slow),
    ],
)
def test_a_loop_without_an_end_is_named_and_ended(policy: str, hook: str, tmp_path: Path) -> None:
    arguments = ("compare", policy, "--slots", "2", "--machine", "t4", "--tokens", "40")
    said = interrupted(tmp_path, "moesim", *arguments)
    assert f"policy '{policy}' has not returned for 1 s" in said[-2]
    assert f"({hook}, mine.py:" in said[-2]
    assert said[-1] == "interrupted: nothing is kept of this run"


@pytest.mark.slow
def test_a_loop_in_compiled_code_is_named_and_ended(tmp_path: Path) -> None:
    policy = "mine.py:Endless:after=3000"
    said = interrupted(tmp_path, "moesim", "compare", policy, "--slots", "2,3,4,5")
    assert "has not returned for 1 s (step " in said[-2]
    assert said[-1] == "interrupted: nothing is kept of this run"


@pytest.mark.slow
def test_a_loop_in_a_live_run_is_named_and_ended(tmp_path: Path) -> None:
    policy = "mine.py:Deaf"
    said = interrupted(tmp_path, *LIVE, "--policy", policy)
    assert any(f"policy '{policy}' has not returned" in line for line in said)
    assert said[-1].startswith("interrupted: ")


def test_what_is_kept_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        with console.keeping("half of it is in t.parquet"):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["moesim"])
    with pytest.raises(SystemExit) as end:
        console.run(app, errors=tuple)
    assert end.value.code == console.INTERRUPTED
    assert capsys.readouterr().err == "interrupted: half of it is in t.parquet\n"
    assert console.what_is_kept() == console.NOTHING_KEPT


def test_a_call_that_goes_on_is_not_overdue() -> None:
    step = [0]
    watch = Watch("policy 'quick'", frozenset, step)
    with watch:
        first = watch.at
        step[0] = 1
        assert watch.at != first
        assert watch.inside
    assert not watch.inside
