"""What a command imports before it knows what to do: a help, and the answer to wrong usage, start
at once. Time itself is not tested: what takes it is which modules are imported."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moerun.cli
import moesim.cli
import moetrace.cli
import pytest
import typer

PROGRAMS: dict[str, Any] = {
    "moesim": typer.main.get_command(moesim.cli.app),
    "moerun": typer.main.get_command(moerun.cli.app),
    "moetrace": typer.main.get_command(moetrace.cli.app),
}
# Each takes a tenth of a second or more to import, and no help needs one.
HEAVY = (
    *("torch", "transformers", "tokenizers", "safetensors", "accelerate", "hqq", "gguf"),
    *("numpy", "polars", "numba", "simpy", "ray", "altair", "vl_convert"),
    *("starlette", "uvicorn", "prometheus_client", "llguidance"),
    *("moepolicy.library", "moeroute.importers"),
)
# Runs the command lines on stdin, and prints for each the exit code and what of HEAVY is imported.
CALLS = """
import contextlib, importlib, io, json, sys
found = []
given = json.load(sys.stdin)
for program, *arguments in given["lines"]:
    sys.argv, code = [program, *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            importlib.import_module(f"{program}.cli").main()
        except SystemExit as end:
            code = end.code or 0
    found.append([code, sorted(set(given["heavy"]) & set(sys.modules))])
print(json.dumps(found))
"""


def imported(lines: list[list[str]], folder: Path) -> list[tuple[int, list[str]]]:
    """Exit code of each command line, and what has been imported of HEAVY when it ended."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps({"lines": lines, "heavy": HEAVY}),
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, names) for code, names in json.loads(done.stdout)]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--nosuch"], 2)])
def test_nothing_heavy_is_imported(arguments: list[str], code: int, tmp_path: Path) -> None:
    lines = [
        [program, *command, *arguments]
        for program, group in PROGRAMS.items()
        for command in ([], *([name] for name in group.commands))
    ]
    found = imported(lines, tmp_path)
    odd = [(line, each) for line, each in zip(lines, found, strict=True) if each != (code, [])]
    assert not odd, odd[0]


def test_the_packages_names_are_imported_when_asked_for(tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import sys, moeroute, moepolicy, moesim, moetrace, moerun",
            f"print(sorted(set({HEAVY!r}) & set(sys.modules)))",
            "import moesim.simulation  # a module's name is no public name's",
            "print(callable(moesim.simulate), moesim.simulate is moesim.simulation.simulate)",
            "print(sorted(set(moesim.__all__) - set(dir(moesim))))",
            "print(moepolicy.find_policy('lru').label, moeroute.open_trace('tiny').meta.n_experts)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["[]", "True True", "[]", "lru 8"]


@pytest.mark.parametrize("name", ["moeroute", "moepolicy", "moesim", "moetrace", "moerun"])
def test_a_package_has_no_module_of_a_public_name(name: str) -> None:
    """Such a module, once imported, would hide the function that is asked for by its name."""
    module = importlib.import_module(name)
    folder = Path(str(module.__file__)).parent
    files = {path.stem for path in folder.iterdir()}
    assert not files & set(module.__all__)
