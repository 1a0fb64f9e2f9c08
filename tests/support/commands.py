"""moerun called in this process, as one of its own would call it."""

from __future__ import annotations

import io
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
