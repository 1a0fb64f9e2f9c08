"""docs/structure.md holds: imports run down, between packages and between a package's modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, CLASS_LINES = 400, 200
# Package: where it lies, and which of the others it may import.
PACKAGES = {
    "moeroute": ("traces", set()),
    "moepolicy": ("policies", set()),
    "moesim": ("simulator", {"moeroute", "moepolicy"}),
    "moerun": ("runtime", {"moeroute", "moepolicy"}),
    "moetrace": ("tracer", {"moeroute", "moepolicy", "moerun"}),
}
OF_THEIR_OWN = {
    ("moesim", "ahead.py"): "python -m moesim.ahead, before the commands",
    ("moeroute", "families.py"): "python -m moeroute.families, for a page",
    ("moeroute", "synthetic.py"): "python -m moeroute.synthetic",
}
# From the ground up: a module imports modules of lower floors only. It is a folder or a file.
FLOORS = {
    "moesim": [
        {"errors", "jit", "result"},
        {"gap", "workload"},
        {"machine"},
        {"engines", "limits", "sizes"},
        {"curves", "simulation"},
        {"ahead", "choice", "conformance", "report"},
        {"fitting", "points", "reading"},
        {"comparison", "pictures", "sweep", "table2"},
        {"overview", "recommend"},
        {"commands"},
        {"cli"},
    ],
    "moerun": [
        {"errors", "versions"},
        {"amounts", "format", "simulation"},
        {"ranges"},
        {"checkpoint", "devices", "kernels"},
        {"store"},
        {"links", "settings"},
        {"offload", "policies"},
        {"memory"},
        {"live"},
        {"bench", "perplexity", "profiling", "serving"},
        {"commands"},
        {"cli"},
    ],
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """The modules of ``package`` by name."""
    root = ROOT / PACKAGES[package][0]
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


def imports(file: Path) -> set[str]:
    """Whatever ``file`` may import, in functions too: modules and the names taken from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def python_files() -> Iterator[Path]:
    """The project's own files: those that git would carry."""
    for folder in (*(folder for folder, _ in PACKAGES.values()), "tests", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_no_file_is_longer_than_it_reads_well() -> None:
    long = {
        str(file.relative_to(ROOT)): n
        for file in python_files()
        if (n := file.read_text(encoding="utf-8").count("\n")) > FILE_LINES
    }
    assert not long, f"of more than {FILE_LINES} lines: {long}"


def test_a_long_class_says_why_it_is_long() -> None:
    silent = []
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                said = " ".join((ast.get_docstring(node) or "").split())
                lines = node.end_lineno - node.lineno + 1
                if lines > CLASS_LINES and "The class is long because" not in said:
                    silent.append(f"{file.relative_to(ROOT)}: {node.name}, {lines} lines")
    assert not silent, silent


def test_durations_are_of_a_clock_that_does_not_jump() -> None:
    """`time.time` is for points in time that others read: an answer's, a file's."""
    used = {
        str(file.relative_to(ROOT))
        for folder, _ in PACKAGES.values()
        for file in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"\btime\.time\(|datetime\.now\(", file.read_text(encoding="utf-8"))
    }
    assert used == {"runtime/moerun/serving/app.py", "simulator/moesim/engines/one_piece.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below(package: str) -> None:
    allowed = PACKAGES[package][1] | {package}
    for name, file in modules(package):
        others = {wanted.split(".")[0] for wanted in imports(file)} & set(PACKAGES)
        assert others <= allowed, name


@pytest.mark.parametrize("package", FLOORS)
def test_modules_import_only_lower_floors(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    known = dict(modules(package))
    seen = set()
    for name, file in known.items():
        if name == package:
            continue  # the package's face shows what its modules have
        room = name.split(".")[1]
        seen.add(room)
        for wanted in imports(file) & set(known) - {package}:
            other = wanted.split(".")[1]
            assert other == room or floor[other] < floor[room], f"{name} imports {wanted}"
    assert seen == set(floor)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    known = dict(modules(package))
    below = {name: imports(file) & set(known) - {name, package} for name, file in known.items()}
    del below[package]
    while free := {name for name, wanted in below.items() if not wanted & set(below)}:
        for name in free:
            del below[name]
    assert not below, f"in a circle, or above one: {', '.join(sorted(below))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_plan_shows_every_module(package: str) -> None:
    plan = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    section = plan.split(f"## {package}:")[1].split("\n## ")[0]
    folder = ROOT / PACKAGES[package][0] / package
    rooms = {file.relative_to(folder).parts[0] for _, file in modules(package)} - {"__init__.py"}
    for room in rooms:
        shown = f"`{room}`" if room.endswith(".py") else f"`{room}/`"
        assert shown in section, f"docs/structure.md does not show {package}'s {shown}"


def test_the_plan_names_files_that_are_there() -> None:
    plan = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(moe\w+/[\w/]*\w\.py)`", plan):
        folder = PACKAGES[path.split("/")[0]][0]
        assert (ROOT / folder / path).is_file(), f"docs/structure.md names {path}"
    for path in re.findall(r"`((?:policies|simulator|runtime|tracer|traces|tests)/[\w/.]+)`", plan):
        assert (ROOT / path).exists(), f"docs/structure.md names {path}"


@pytest.mark.parametrize("package", PACKAGES)
def test_commands_print_by_the_console_alone(package: str) -> None:
    # emit, say and note know terminals, widths, full disks and lines that stand unfinished.
    root = ROOT / PACKAGES[package][0] / package
    odd = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo")
        if (package, file.name) not in OF_THEIR_OWN
    ]
    assert not odd
