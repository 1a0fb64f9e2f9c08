"""A small corpus, the bundled model, and the command run as a user would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from moetrace.model import Checkpoint, load


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return load("tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with a little prose, a little code and a file that is no text."""
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("It was a bright cold day in April. " * 20)
    (folder / "deeper" / "b.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 20)
    (folder / "c.bin").write_bytes(b"\0\1\2" * 100)
    return folder


@pytest.fixture
def moetrace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The command's entry point with these arguments, in this process."""
    from moetrace.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moetrace", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run
