"""What no run could have is refused before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# An import of a library that takes seconds ends the command with a traceback.
WITHOUT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from moerun.cli import main
main()
"""
PROMPT = ("--prompt", "x")


def refused(*arguments: str, code: int) -> str:
    """The line that a command ends with, in a process that has neither torch nor transformers."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((*PROMPT, "--max-new-tokens", "0"), 2, "max-new-tokens must be 1 or more, not 0"),
        ((*PROMPT, "--streams", "7", "--memory", "9 cows"), 2, "'9 cows' is no amount"),
        ((*PROMPT, "--precision", "9bit"), 2, "there is no precision '9bit'"),
        ((*PROMPT, "--model", "nowhere/"), 1, "there is no model 'nowhere/'"),
        (("pack", "nowhere.gguf", "--out", "o"), 1, "there is no model 'nowhere.gguf'"),
        (("chat", "--top-p", "3"), 2, "top-p must be above 0"),
        (("profile", "--out", "m.toml", "--rounds", "0"), 2, "rounds must be 1 or more"),
        (("fidelity", "nosuch"), 2, "unknown policy 'nosuch'"),
        (("perplexity", "nowhere.txt"), 1, "nowhere.txt is not there"),
        (("bench", "--shape", "nosuch"), 2, "unknown shape 'nosuch'"),
        (
            ("bench", "--shape", "mixtral-8x7b", "--layers", "99"),
            2,
            "error: --layers must be 1 to 32",
        ),
        (("bench", "--tokens", "0"), 2, "error: --tokens must be 1 or more"),
    ],
)
def test_it_is_refused_before_torch_is_imported(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(*arguments, code=code)


def test_a_port_in_use_is_told_before_torch_is_imported() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("serve", "--port", str(port), code=1)
