"""moerun called in this process, as one of its own would call it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from moerun.cli import main


class Ended(NamedTuple):
    """What a finished command left behind."""

    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Ended]

PROMPT = "It was the best of times"


def caller(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *before: str,
    home: Path | None = None,
) -> Call:
    """Calls the entry point with ``before`` and whatever it is given; ``home`` is for caches."""
    monkeypatch.setenv("COLUMNS", "200")
    if home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))

    def call(*arguments: str | Path, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["moerun", *before, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return call


def error_line(done: Ended | subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line a failed command ends with; it must not be a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "" not in lines
    assert lines[-1].startswith("error: ")
    return lines[-1]
