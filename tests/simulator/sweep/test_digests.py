"""What a sweep's finished points depend on: the list of code that decides them is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import moesim
from moesim.sweep.digests import DECIDES

ROOT = Path(moesim.__file__).parent


def file_of(module: str) -> Path | None:
    path = ROOT.parent.joinpath(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def imported(file: Path) -> set[Path]:
    """The files of moesim that ``file`` imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = {file_of(name) for name in names if name.split(".")[0] == "moesim"}
    return {path for path in found if path is not None}


def test_the_digest_covers_all_that_a_simulation_and_its_limits_import() -> None:
    pending = [ROOT / "simulation.py", *(ROOT / "limits").glob("*.py")]
    reached: set[Path] = set()
    while pending:
        file = pending.pop()
        if file not in reached:
            reached.add(file)
            pending += imported(file)
    parts = {file.relative_to(ROOT).parts[0] for file in reached} - {"__init__.py"}
    assert parts == set(DECIDES)
    assert ROOT / "engines" / "replay.py" in reached
