"""Every command in a poor place: 40 columns, a dumb terminal, ASCII alone, a home that cannot be
written to. Nothing is cut, nothing is garbled, nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moerun.cli
import moesim.cli
import moetrace.cli
import typer

PROGRAMS: dict[str, Any] = {
    "moesim": typer.main.get_command(moesim.cli.app),
    "moerun": typer.main.get_command(moerun.cli.app),
    "moetrace": typer.main.get_command(moetrace.cli.app),
}
COLUMNS = 40
POOR = {
    "COLUMNS": str(COLUMNS),
    "TERM": "dumb",
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "HOME": "/proc/nohome",  # nothing can be made there, by root neither
    "XDG_CACHE_HOME": "/proc/nocache",
}
# Runs the command lines on stdin in this process; prints exit code, stdout and stderr of each.
CALLS = """
import importlib, io, json, sys, traceback
lines, found = json.load(sys.stdin), []
sys.modules["torch"] = sys.modules["transformers"] = None
for program, *arguments in lines:
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    sys.argv, code = [program, *arguments], 0
    try:
        importlib.import_module(f"{program}.cli").main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = "Traceback"
        sys.stderr.write(traceback.format_exc())
    texts = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("ascii"))
    sys.stdout, sys.stderr = kept
    found.append([code, *texts])
print(json.dumps(found))
"""
# Commands that answer at once.
QUICK = [
    "moesim machines",
    "moesim machines t4 rtx4070",
    "moesim policies",
    "moesim policies lru-spec",
    "moesim new mine.py",
    "moerun policies",
    "moerun policies lru",
    "moerun families",
    "moetrace import --formats",
    "moetrace export tiny --to counts --out counts.json",
    "moetrace stats tiny",
]


def outcomes(lines: list[list[str]], folder: Path) -> list[tuple[Any, str, str]]:
    """Exit code, stdout and stderr of each command line, in a poor place."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps(lines),
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "LANG"} | POOR,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def too_wide(text: str) -> list[str]:
    """Lines wider than the terminal, but for those of a long word, which is never cut."""
    return [
        line
        for line in text.splitlines()
        if len(line) > COLUMNS and max(map(len, line.split())) < COLUMNS // 2
    ]


def test_every_help_fits_and_is_ascii(tmp_path: Path) -> None:
    lines = [
        [program, *command, "--help"]
        for program, group in PROGRAMS.items()
        for command in ([], *([name] for name in group.commands))
    ]
    for line, (code, out, err) in zip(lines, outcomes(lines, tmp_path), strict=True):
        assert (code, err, too_wide(out)) == (0, "", []), line


def test_what_answers_at_once_fits_and_is_ascii(tmp_path: Path) -> None:
    lines = [line.split() for line in QUICK]
    for line, (code, out, err) in zip(lines, outcomes(lines, tmp_path), strict=True):
        assert (code, too_wide(out)) == (0, []), (line, out, err)
        assert "\x1b" not in out + err, line


def test_mistakes_are_one_line_there_too(tmp_path: Path) -> None:
    missing = "nofolder/x"
    lines = [
        ["moesim", "compare", "LRU"],
        ["moesim", "compare", "lru", "--trace", "."],
        ["moesim", "compare", "lru", "--out", f"{missing}.csv"],
        ["moesim", "recommend", "mixtral-8x7b", "--config", f"{missing}.toml"],
        ["moerun", "generate", "--policy", "LRU"],
        ["moerun", "fidelity", "--out", f"{missing}.csv"],
        ["moetrace", "stats", "nosuch"],
        ["moetrace", "record", "nofile.txt", "--out", "t.parquet"],
    ]
    for line, (code, out, err) in zip(lines, outcomes(lines, tmp_path), strict=True):
        assert code in (1, 2), (line, code, err)
        assert out == "", line
        assert err.startswith("error: "), line
        assert err.count("\n") == 1, err
