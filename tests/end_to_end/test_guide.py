"""Every command and file of docs/writing-a-policy.md, as they stand there, in a scratch folder."""

from __future__ import annotations

import os
import re
import shlex
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import moerun.cli
import moesim.cli
import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "writing-a-policy.md").read_text(encoding="utf-8")
PROGRAM = r"(?:moesim|moerun|pip) "
SOURCES = ("traces", "policies", "simulator", "runtime", "tracer")
MAINS: dict[str, Callable[[], None]] = {"moesim": moesim.cli.main, "moerun": moerun.cli.main}


class Run(NamedTuple):
    """What a command of the guide must print, and whether it takes long."""

    prints: str
    slow: bool = False
    installed: bool = False  # needs the package: run by the test that installs it


RUNS = {
    "moesim new my_policy.py": Run("my_policy.py has the policy Mine"),
    "moesim policies my_policy.py:Mine": Run("half_life=1000"),
    "moesim compare lru my_policy.py:Mine belady": Run("my_policy.py:Mine"),
    "moesim compare my_policy.py:Mine:half_life=100 my_policy.py:Mine:half_life=5000 "
    "--slots 4": Run("my_policy.py:Mine:half_life=5000"),
    "moesim compare lru lru-spec:n=1 ahead.py:Ahead --slots 4 --machine cpu-disk": Run(
        "ahead.py:Ahead"
    ),
    "moesim fit fitted.py:Popular --out popular.safetensors": Run("fitted.py:Popular fitted on 8"),
    "moesim compare lru fitted.py:Popular:params=popular.safetensors --held-out --slots 4": Run(
        "on sequences held out from fits"
    ),
    'moesim compare lru+ahead.py:Ahead.prefetching "lru+gate(n=1)" --slots 4': Run(
        "lru+ahead.py:Ahead.prefetching"
    ),
    "moesim check my_policy.py:Mine --only rules,repeats,memory": Run("ok rules"),
    "moesim check my_policy.py:Mine": Run("ok compiled", slow=True),
    'moerun generate --policy my_policy.py:Mine --slots 4 --prompt "Once upon a time"': Run(
        "policy my_policy.py:Mine: 4 slots a layer"
    ),
    "moerun fidelity lru my_policy.py:Mine --slots 4 --link-gbps 0.5": Run("live tok/s", slow=True),
    "pip install ./my_policies": Run("Successfully installed my-policies", installed=True),
    "moesim policies my-lfu": Run("half_life=1000", installed=True),
    "moesim compare lru my-lfu": Run("my-lfu", installed=True),
    'moerun generate --policy my-lfu --slots 4 --prompt "Once upon a time"': Run(
        "policy my-lfu: 4 slots a layer", installed=True
    ),
}


def block(first: str) -> str:
    """The indented block that begins with the line ``first``."""
    lines = []
    for line in GUIDE[GUIDE.index(f"    {first}\n") :].splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line.removeprefix("    "))
    return "\n".join(lines).strip() + "\n"


def commands() -> list[str]:
    return [line.strip() for line in GUIDE.splitlines() if re.match(f"    {PROGRAM}", line)]


def test_every_command_of_the_guide_is_run() -> None:
    assert commands() == list(RUNS)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs a command in a folder of its own; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(command: str) -> str:
        program, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            MAINS[program]()
        out, err = capsys.readouterr()
        assert not end.value.code, (out, err)
        assert "Traceback" not in err
        return " ".join((out + err).split())

    return run


def here() -> list[Any]:
    return [
        pytest.param(command, marks=[pytest.mark.slow] if run.slow else [], id=command)
        for command, run in RUNS.items()
        if not run.installed
    ]


@pytest.mark.parametrize("command", here())
def test_a_command_of_the_guide(command: str, call: Callable[[str], str]) -> None:
    new = "moesim new my_policy.py"
    if command != new:
        call(new)
        Path("ahead.py").write_text(block("# ahead.py"))
        Path("fitted.py").write_text(block("# fitted.py"))
    if "params=" in command:
        call(next(other for other in RUNS if other.startswith("moesim fit")))
    bound = " --seconds 20" if command.startswith("moerun fidelity") else ""
    assert RUNS[command].prints in call(command + bound)


def test_the_second_policy_of_the_guide_conforms(call: Callable[[str], str]) -> None:
    Path("ahead.py").write_text(block("# ahead.py"))
    told = call("moesim check ahead.py:Ahead --only rules,repeats,live,memory,limit")
    assert "FAILED" not in told


def clean_python(folder: Path) -> Path:
    """A venv with nothing installed that finds what this one has by a path file: no download."""
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    paths = [*(str(ROOT / source) for source in SOURCES), *site.getsitepackages()]
    (site_packages / "below.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_package_of_the_guide_is_installed_and_found(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    python = clean_python(tmp_path / "venv")
    package = tmp_path / "my_policies"
    package.mkdir()
    (package / "pyproject.toml").write_text(block("[build-system]"))
    (package / "test_my_policies.py").write_text(block("# test_my_policies.py"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "100"}

    def run(*command: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return " ".join((done.stdout + done.stderr).split())

    def program(command: str, code: int = 0) -> str:
        name, *arguments = shlex.split(command)
        main = f"from {name}.cli import main; main()"
        return run(python, "-c", main, *arguments, code=code)

    program("moesim new my_policies/my_policies.py")
    assert "unknown policy 'my-lfu'" in program("moesim policies my-lfu", code=2)
    for command, expected in RUNS.items():
        if not expected.installed:
            continue
        if command.startswith("pip "):
            pip = [sys.executable, "-m", "pip", "--python", str(python)]
            offline = ("--no-deps", "--no-build-isolation", "--no-index")
            told = run(*pip, *shlex.split(command)[1:], *offline)
        else:
            told = program(command)
        assert expected.prints in told, command
    quick = "rules or repeats or live or memory"
    tests = (python, "-m", "pytest", "-q", package, "-k", quick, "-p", "no:cacheprovider")
    assert "4 passed" in run(*tests)
