"""What is depended on: pinned with hashes, under licences that are listed, and used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("run", "serve", "ray", "dev")  # in the lock
FOLDERS = ("traces", "policies", "simulator", "runtime", "tracer", "tests", "benchmarks")
PERMISSIVE = {
    *("MIT", "ISC", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Zlib", "BSL-1.0", "PSF-2.0"),
    *("Apache-2.0", "LLVM-exception", "CNRI-Python", "CC0-1.0"),
    "MPL-2.0",  # of files, not of what uses them
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text()
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE))


def named(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> list[Requirement]:
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in wanted]


def test_the_lock_has_what_the_project_asks_for_at_the_versions_of_the_constraints() -> None:
    locked, constraints = pins("requirements.lock"), pins("constraints.txt")
    for wanted in requirements(*EXTRAS):
        version = locked[named(wanted.name)]
        assert version.partition("+")[0] in wanted.specifier, wanted
    for name, version in constraints.items():
        if named(name) in locked:
            assert locked[named(name)].partition("+")[0] == version, name
    elsewhere = {
        named(wanted.name) for wanted in requirements("guided", "bench", "clients", "plots")
    }
    assert {named(name) for name in constraints} <= locked.keys() | elsewhere


def test_every_version_of_the_lock_has_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text.partition("\naccelerate==")[2])
    assert len(entries) == len(pins("requirements.lock"))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry.splitlines()[0]


def test_the_licences_of_the_lock_are_listed_and_permissive() -> None:
    page = (ROOT / "docs/licences.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9._-]+) \| (\S+) \| (.+) \|$", page, re.MULTILINE)
    assert {name: version for name, version, _ in rows[0:] if name != "package"} == pins(
        "requirements.lock"
    )
    for name, _, licence in rows:
        if name != "package":
            assert set(re.split(r" (?:AND|OR|WITH) ", licence)) <= PERMISSIVE, (name, licence)


@cache
def imported() -> frozenset[str]:
    return frozenset(_imported())


def _imported() -> Iterator[str]:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.partition(".")[0]


@cache
def commands() -> str:
    """Where tools are run that nobody imports."""
    files = [ROOT / "Makefile", *(ROOT / "benchmarks").glob("*.py")]
    files += (ROOT / "tests").rglob("*.py")
    texts = (file.read_text(encoding="utf-8") for file in files if file != Path(__file__))
    # An option of pytest's is all that there is of pytest-xdist.
    return "\n".join(texts).replace("-n 2", "-n 2 pytest-xdist")


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_declared_dependency_is_used(extra: str) -> None:
    modules: dict[str, set[str]] = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        for package in packages:
            modules.setdefault(named(package), set()).add(module)
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for name in (Requirement(text).name for text in declared):
        own = modules.get(named(name), {name.replace("-", "_")})
        run = re.search(rf"\b{re.escape(name)}\b", commands())
        assert own & imported() or run, f"nothing uses {name}"
