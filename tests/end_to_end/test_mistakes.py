"""A mistake on the command line: one line, at once, the exit code of its kind, in every command.

2  wrong usage: an unknown option, name or number, whatever lies on the disk
1  a file that is not there or not what it should be, a folder that nothing can be written to

The cases are made from the commands' own parameters, so that a new command or option joins by
itself. They run in a process that can import neither torch nor transformers, which take seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import moerun.cli
import moesim.cli
import moetrace.cli
import polars as pl
import pytest
import typer
from moeroute import open_trace
from moeroute.schema import FORMAT_VERSION

PROGRAMS: dict[str, Any] = {
    "moesim": typer.main.get_command(moesim.cli.app),
    "moerun": typer.main.get_command(moerun.cli.app),
    "moetrace": typer.main.get_command(moetrace.cli.app),
}
# Calls the command lines on stdin, and prints exit code, stdout and stderr of each.
CALLS = """
import contextlib, importlib, io, json, sys, traceback
sys.modules["torch"] = sys.modules["transformers"] = None

def call(program, *arguments):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv, sys.stdin = [program, *arguments], io.StringIO("")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"{program}.cli").main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = "Traceback"
            err.write(traceback.format_exc())
    return code, out.getvalue(), err.getvalue()

print(json.dumps([call(*each) for each in json.load(sys.stdin)]))
"""
# What a command needs besides its mistake.
NEEDED = {
    "compare": ["lru"],
    "curve": ["lru"],
    "sweep": ["lru", "--out", "r.csv"],
    "report": ["tiny", "--out", "r.html"],
    "recommend": ["mixtral-8x7b"],
    "fit": ["edgemoe", "--out", "f.safetensors"],
    "check": ["lru"],
    "new": ["mine.py"],
    "pack": ["tiny", "--out", "store"],
    "profile": ["--out", "m.toml"],
    "record": ["text.txt", "--out", "t.parquet"],
    "import": ["r.json", "--out", "t.parquet"],
    "export": ["tiny", "--to", "counts", "--out", "c.json"],
}
# Values that are wrong, by the option that they are given to, and the exit code. A name that was
# typed in another case is told which one was meant.
NAMES = {
    "--trace": ["nosuch", "TINY"],
    "--machine": ["nosuch", "T4"],
    "--disk": ["nosuch"],
    "--policy": ["nosuch", "LRU", "lru:m=1"],
    "--policies": ["nosuch", "LRU"],
    "--model": ["nosuch"],
    "--calibration": ["nosuch", "TINY"],
    "--like": ["nosuch", "Mixtral-8x7B"],
    "--scope": ["nosuch", "LAYER"],
    "--attention": ["nosuch"],
    "--engine": ["nosuch", "SIMPY"],
    "--format": ["nosuch", "JSON"],
    "--device": ["nosuch"],
    "--shape": ["nosuch", "TINY"],
    "--routing": ["nosuch", "TINY"],
    "--slots": ["two", "-1"],
    "--memory": ["lots"],
    "--host-memory": ["lots"],
    "--chunk": ["lots"],
    "--streams": ["9"],
    "--plot": ["x.bmp"],
    "--on": ["nosuch"],
    "--only": ["nosuch"],
    "--reading": ["nosuch"],
    "--map": ["x"],
    "--weight-rule": ["nosuch"],
    "--prediction": ["nosuch"],
}
FILES = {
    "--trace": [".", "nofile.parquet", "bad.toml", "later.parquet"],
    "--machine": ["nofile.toml", "bad.toml", "typo.toml"],
    "--policy": ["nofile.py:A"],
    "--model": ["nofolder/"],
    "--calibration": ["nofile.parquet", ".", "later.parquet"],
    "--like": ["nofile.json"],
    "--shape": ["nofile.json"],
    "--routing": ["nofile.parquet", ".", "later.parquet"],
    "--out": ["nofolder/x"],
    "--plot": ["nofolder/x.svg"],
    "--timeline": ["nofolder/x.json.gz"],
    "--config": ["nofile.toml", "bad.toml", "typo.toml"],
    "--record": ["nofolder/t.parquet"],
    "--journal": ["nofolder/t.json"],
    "--pictures": ["nofolder/p"],
    "--grid": ["nofile.toml", "bad.toml", "typo.toml"],
    "--memory-file": ["nofile.txt"],
    "--learned": ["nofolder/x.safetensors"],
}
ARGUMENTS = {
    "POLICY": (["nosuch", "LRU"], ["nofile.py:A"]),
    "TRACE": (["nosuch", "TINY"], [".", "nofile.parquet", "later.parquet"]),
    "MACHINE": (["nosuch", "T4"], ["nofile.toml"]),
    "MODEL": (["nosuch"], ["nofolder/"]),
    "CORPUS": ([], ["nofile.txt"]),
    "TEXT": ([], ["nofile.txt"]),
}
# Options whose value there is another rule for, and why.
SPARED = {
    ("moerun", "pack", "--out"): "makes the folders of its store",
    ("moesim", "recommend", "--config"): "a file to write",
    ("moesim", "curve", "POLICY"): "has a list of its own",
    ("moesim", "fit", "POLICY"): "has a list of its own",
    ("moetrace", "import", "--model"): "any name is one",
    ("moetrace", "import", "--format"): "of the file",
    ("moetrace", "import", "--attention"): "needs --like",
    ("moetrace", "export", "--policy"): "needs --to placement",
}


class Case(NamedTuple):
    """A command line with one mistake, the word that is wrong, and the exit code."""

    line: tuple[str, ...]
    wrong: str
    code: int


def cases() -> list[Case]:
    """Every mistake of the tables that a command's parameters have room for."""
    found = []
    for program, group in PROGRAMS.items():
        for name, command in group.commands.items():
            needed = NEEDED.get(name, [])
            found.append(Case((program, name, *needed, "--nosuch"), "--nosuch", 2))
            if needed:
                found.append(Case((program, name), "", 2))
            for param in command.params:
                found += _of(program, name, param)
    return found


def _of(program: str, name: str, param: Any) -> list[Case]:
    argument = param.param_type_name == "argument"
    option = (param.metavar or param.name.upper()).strip("[].") if argument else param.opts[-1]
    if (program, name, option) in SPARED:
        return []
    if argument:
        wrong, missing = ARGUMENTS.get(option, ([], []))
    else:
        wrong, missing = NAMES.get(option, []), FILES.get(option, [])
    return [
        Case((program, name, *_with(name, option, value, argument=argument)), value, code)
        for code, values in ((2, wrong), (1, missing))
        for value in values
    ]


def _with(name: str, option: str, value: str, *, argument: bool) -> list[str]:
    """What the command needs, with the wrong value in the place of the right one."""
    needed = list(NEEDED.get(name, []))
    if argument:
        return [value, *needed[1:]] if needed and needed[0][0] != "-" else [value, *needed]
    if option == "--out":
        suffix = Path(needed[needed.index(option) + 1]).suffix if option in needed else ".csv"
        value += ".jsonl" if name == "perplexity" else suffix
    if option in needed:
        at = needed.index(option)
        return [*needed[:at], *needed[at + 2 :], option, value]
    return [*needed, option, value]


FEW = {"--nosuch", "", ".", "later.parquet", "T4", "TINY", "LRU", "typo.toml", "nofile.txt"}


def told(folder: Path, wanted: list[Case]) -> list[tuple[Case, Any, str, str]]:
    """What became of each case, in a folder with files that are wrong in several ways."""
    (folder / "text.txt").write_text("some text\n")
    (folder / "r.json").write_text("{}\n")
    (folder / "bad.toml").write_text('name = "x\n')
    (folder / "typo.toml").write_text("slotz = 3\n")
    _write_of_a_later_version(folder / "later.parquet")
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps([case.line for case in wanted]),
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    return [(case, *each) for case, each in zip(wanted, json.loads(done.stdout), strict=True)]


def _write_of_a_later_version(path: Path) -> None:
    tiny = open_trace("tiny").path
    kept = pl.read_parquet_metadata(tiny)
    (name,) = [name for name, text in kept.items() if "format_version" in text]
    meta = json.dumps(json.loads(kept[name]) | {"format_version": FORMAT_VERSION + 1})
    pl.read_parquet(tiny, n_rows=64).write_parquet(path, metadata={name: meta})


def check(folder: Path, wanted: list[Case]) -> None:
    before = {"text.txt", "r.json", "bad.toml", "typo.toml", "later.parquet", "cache"}
    odd = []
    for case, code, out, err in told(folder, wanted):
        lines = err.splitlines()
        wrong = case.wrong.partition(":")[0]
        other_case = wrong != wrong.lower()
        if not (
            code == case.code
            and out == ""
            and len(lines) == 1
            and lines[0].startswith("error: ")
            and (wrong in lines[0] or case.line[-2].lstrip("-") in lines[0])
            and (not other_case or f"'{wrong.lower()}'" in lines[0])
        ):
            odd.append(f"{' '.join(case.line)}: {code}, not {case.code}: {out[-200:]}{err[-500:]}")
    assert not odd, "\n".join(odd)
    assert {path.name for path in folder.iterdir()} <= before


def test_mistakes_are_told_in_one_line_by_every_command(tmp_path: Path) -> None:
    check(tmp_path, [each for each in cases() if each.wrong in FEW or "--out" in each.line[-2:]])


@pytest.mark.slow
def test_all_mistakes_that_there_is_room_for(tmp_path: Path) -> None:
    check(tmp_path, cases())


def test_what_is_spared_is_there() -> None:
    for program, name, option in SPARED:
        params = PROGRAMS[program].commands[name].params
        known = {each for param in params for each in (*param.opts, param.metavar)}
        assert option in known, (program, name, option)
