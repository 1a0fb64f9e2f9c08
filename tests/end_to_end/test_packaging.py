"""What is built: the same bytes each time, and programs that help where no extra is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from moepolicy.versions import EXTRAS, extra_with, lacking

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROGRAMS = tuple(PROJECT["scripts"])
EPOCH = "1700000000"
# Prints what is wrong with the help of any command, where no extra is installed.
HELPS = """
import contextlib, importlib, io, sys
import typer

def call(program, *arguments):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [program, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main()
        except SystemExit as end:
            if end.code or not out.getvalue():
                return f"{program} {arguments}: {end.code} {err.getvalue()}"
    return None

for program in ("moesim", "moerun", "moetrace"):
    module = importlib.import_module(f"{program}.cli")
    lines = [("--help",), ("--version",)]
    lines += [(name, "--help") for name in typer.main.get_command(module.app).commands]
    print(*filter(None, [call(program, *line) for line in lines]), sep="\\n", end="")
"""


def build(source: Path, out: Path, *targets: str) -> dict[str, bytes]:
    """The files that a build of ``source`` makes, by name."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    for target in targets:
        command += ["-t", target]
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def required(name: str, seen: set[str]) -> Iterator[Distribution]:
    """An installed distribution and all that it requires without extras."""
    if name in seen:
        return
    seen.add(name)
    found = distribution(name)
    yield found
    for line in found.requires or []:
        match = re.match(r"[\w.-]+", line)
        if match and "extra ==" not in line and "sys_platform == 'win32'" not in line:
            try:
                yield from required(match[0].lower().replace("_", "-"), seen)
            except ModuleNotFoundError:  # of another Python or system
                continue


@pytest.mark.slow
def test_two_builds_are_equal_and_hold_what_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    first = build(ROOT, tmp_path / "first", "sdist", "wheel")
    copy = tmp_path / "copy"
    shutil.unpack_archive(next((tmp_path / "first").glob("*.tar.gz")), copy, filter="data")
    (unpacked,) = copy.iterdir()
    second = build(ROOT, tmp_path / "second", "sdist")
    second |= build(unpacked, tmp_path / "third", "wheel")  # no git, another folder
    assert {name.rpartition(".")[2] for name in first} == {"gz", "whl"}
    assert [name for name in first if first[name] != second[name]] == []
    (wheel,) = (tmp_path / "first").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "moeroute/models.toml",
        "moeroute/samples/tiny.parquet",
        "moesim/machines/t4.toml",
        "moerun/models/tiny/model.safetensors",
        *(f"{package}/py.typed" for package in ("moepolicy", "moesim", "moerun", "moetrace")),
    ):
        assert wanted in names, wanted
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    (sdist,) = (tmp_path / "first").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [one for one in archive.getnames() if "/.git/" in one or "/.venv" in one]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and what it requires, and no extra.

    What is required is linked to from this environment: nothing is downloaded.
    """
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("bare")
    build(ROOT, folder / "dist", "wheel")
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    seen: set[str] = set()
    for line in PROJECT["dependencies"]:
        for found in required(re.split("[>=<]", line)[0], seen):
            for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
                place = Path(str(found.locate_file(top)))
                if place.exists() and not (packages / top).exists():
                    (packages / top).symlink_to(place)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True)
    return python


def run(python: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *command],
        cwd=folder,
        env=environment | {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_every_command_helps_without_extras(bare: Path, tmp_path: Path) -> None:
    done = run(bare, tmp_path, "-c", HELPS)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        (("moerun", "--prompt", "x"), "torch", "run"),
        (("moerun", "chat"), "torch", "run"),
        (("moerun", "bench", "--tokens", "1"), "torch", "run"),
        (("moerun", "pack", "tiny", "--out", "store"), "torch", "run"),
        (("moetrace", "record", "text.txt", "--out", "t.parquet"), "torch", "run"),
        (("moerun", "serve"), "starlette", "run,serve"),
        (("moesim", "report", "tiny", "--out", "r.html"), "", "plots"),
        (("moesim", "sweep", "lru", "--out", "r.csv", "--on", "ray"), "", "ray"),
    ],
)
def test_what_needs_an_extra_names_it(
    line: tuple[str, ...], package: str, extra: str, bare: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    done = run(bare, tmp_path, str(bare.with_name(line[0])), *line[1:])
    assert done.returncode == 1, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("error: ")
    assert package in told[0]
    assert f"moe-offload-lab[{extra}]" in told[0]


@pytest.mark.slow
def test_the_simulator_works_without_extras(bare: Path, tmp_path: Path) -> None:
    line = ("compare", "lru", "lfu", "--tokens", "40", "--slots", "4", "--no-limits")
    done = run(bare, tmp_path, str(bare.with_name("moesim")), *line)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout


def test_extras_are_known_by_the_modules_that_they_bring() -> None:
    assert set(EXTRAS) <= set(PROJECT["optional-dependencies"])
    assert extra_with("torch.nn") == "run"
    assert extra_with("compressed_tensors") == "run"
    assert extra_with("prometheus_client") == "serve"
    assert extra_with("vl_convert") == "plots"
    assert extra_with("nosuch") is None
    assert "pip install 'moe-offload-lab[run]'" in lacking("torch")


COPIED = re.compile(r"^COPY (.*) \S+$", re.MULTILINE)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_a_dockerfile_copies_and_runs_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    instructions = [line.split()[0] for line in lines]
    assert instructions[0] == "FROM"
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "CMD"}
    assert set(instructions) <= known
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for sources in COPIED.findall(joined):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source
    # All that the build of the wheel reads is copied.
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    copied = " ".join(COPIED.findall(joined)).split()
    for wanted in packages["targets"]["wheel"]["packages"]:
        assert wanted.split("/")[0] in copied
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= set(copied)
    python = re.search(r"^FROM python:(\d+\.\d+)", joined, re.MULTILINE)
    assert python
    assert f"Programming Language :: Python :: {python[1]}" in PROJECT["classifiers"]
    extras = re.search(r"'\.\[(.*?)\]'", joined)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    for module in re.findall(r"python -m (\S+)", joined):
        assert (ROOT / "simulator" / f"{module.replace('.', '/')}.py").is_file()
    command = re.search(r'^CMD \["(\w+)", "(\w+)"', joined, re.MULTILINE)
    assert command
    assert command[1] in PROGRAMS
    assert (ROOT / SOURCES[command[1]] / "commands" / f"{command[2]}.py").is_file()


SOURCES = {"moesim": "simulator/moesim", "moerun": "runtime/moerun"}
