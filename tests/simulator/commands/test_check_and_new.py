"""`moesim check` and `moesim new`: their lines, exit codes and files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from moesim.cli import main
from moesim.conformance import CHECKS
from support.commands import Ended, error_line

Call = Callable[..., Ended]
BAD = """
from moepolicy import Policy

class Mine(Policy):
    def victim(self, layer, incoming, candidates):
        return incoming
"""


@pytest.fixture
def moesim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code is None or isinstance(end.value.code, int)
        return Ended(end.value.code or 0, *capsys.readouterr())

    return call


def test_a_line_for_each_check_and_an_exit_code(moesim: Call) -> None:
    done = moesim("check", "lru", "--only", "rules, limit")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", "rules"],
        ["ok", "limit"],
    ]
    remark = moesim("check", "belady", "--only", "live")
    assert (remark.returncode, remark.stdout.split()[0]) == (0, "remark")


def test_a_failure_is_told_once_with_step_and_line(moesim: Call) -> None:
    Path("mine.py").write_text(BAD)
    done = moesim("check", "mine.py:Mine", "--only", "rules,repeats,memory")
    assert done.returncode == 1
    assert done.stderr == ""
    whole = " ".join(done.stdout.split())
    assert whole.startswith("FAILED rules policy 'mine.py:Mine' failed: victim ")
    assert "not among the candidates: it answered" in whole
    assert "mine.py:5)" in whole
    assert "FAILED repeats " in whole
    rows = json.loads(moesim("check", "mine.py:Mine", "--only", "rules", "--format=json").stdout)
    assert [(row["policy"], row["check"], row["status"]) for row in rows] == [
        ("mine.py:Mine", "rules", "FAILED")
    ]
    assert rows[0]["said"] in whole


def test_the_same_failure_of_the_next_check_refers_to_the_first(moesim: Call) -> None:
    Path("mine.py").write_text(BAD.replace("return incoming", "return int(candidates[0])"))
    with Path("mine.py").open("a") as file:
        file.write("    def on_step(self, step):\n        1 / 0\n")
    done = moesim("check", "mine.py:Mine", "--only", "rules,repeats,resize")
    whole = " ".join(done.stdout.split())
    assert "ZeroDivisionError: division by zero (on_step, step 0, " in whole
    assert "FAILED repeats as rules FAILED resize as rules" in whole


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "lruu"), "unknown policy 'lruu'; did you mean 'lru'?"),
        (("check", "lru", "--only", "speed"), f"there are: {', '.join(CHECKS)}"),
        (("check", "mine.py:Mine"), "no policy file mine.py"),
        (("new", "mine.txt"), "FILE mine.txt: the suffix says the format, and there are: .py"),
        (("new", "mine.py", "--name", "my class"), "--name my class is no name for a class"),
        (("new", "mine.py", "--name", "Policy"), "--name Policy is no name for a class"),
        (("new", "nowhere/mine.py"), "the folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_checked_or_written_is_one_line(
    moesim: Call, arguments: tuple[str, ...], says: str
) -> None:
    failed = says.startswith(("no policy file", "the folder"))
    assert says in error_line(moesim(*arguments), 1 if failed else 2)
    assert not list(Path().iterdir())


def test_a_new_policy_is_written_once_and_never_over_another(moesim: Call) -> None:
    done = moesim("new", "mine.py", "--name", "Other")
    assert done.returncode == 0
    assert "moesim check mine.py:Other\n" in done.stdout
    text = Path("mine.py").read_text()
    assert "class Other(Policy):" in text
    assert len(text.splitlines()) < 45
    assert "exists already" in error_line(moesim("new", "mine.py"), 1)
    assert Path("mine.py").read_text() == text
    assert moesim("new", "mine.py", "--force").returncode == 0
    assert "class Mine(Policy):" in Path("mine.py").read_text()


@pytest.mark.slow
def test_a_new_policy_passes_every_check(moesim: Call) -> None:
    moesim("new", "mine.py")
    done = moesim("check", "mine.py:Mine")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "] == ["ok"] * len(
        CHECKS
    )
