"""A home that nothing can be written to: commands that keep nothing run, the others say what to
name instead. The folders cannot be made even by root, whom no permission stops."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from moerun.errors import RunError
from moerun.perplexity.results import Results

READING = [
    ("moesim", "policies"),
    ("moesim", "machines"),
    ("moerun", "families"),
    ("moerun", "policies"),
    ("moetrace", "stats", "tiny"),
]
GENERATE = ("moerun", "generate", "--prompt", "Once", "--max-new-tokens", "2", "--slots", "4")


@pytest.fixture(params=["below a file", "below what is not there"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, which cannot be made."""
    (tmp_path / "file").touch()
    nowhere = Path("/proc/nowhere") if Path("/proc/self").exists() else tmp_path / "file"
    folder = (tmp_path / "file" if request.param == "below a file" else nowhere) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("HOME", str(folder.parent))
    return folder


def called(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"{program}.cli").main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_commands_that_keep_nothing_run(
    cache: Path,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert called(monkeypatch, *command) == 0
    shown = capsys.readouterr()
    assert shown.out
    assert shown.err == ""


def test_a_model_that_cannot_be_packed_there_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *GENERATE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: nothing can be written to {cache}/moerun/stores (")
    assert line.endswith("): name a folder for the packed model with --store")


def test_results_that_cannot_be_kept_there_are_told(cache: Path) -> None:
    place = cache / "moerun" / "perplexity" / "tiny.jsonl"
    with pytest.raises(RunError, match="name another file for the results with --out") as caught:
        Results(place, {})
    named = str(caught.value).split(" cannot be written (")[0]
    assert Path(named) in (place.parent, *place.parent.parents)
