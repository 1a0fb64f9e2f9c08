"""What lint looks at: the same before a commit as in `make lint`, and all the code there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
EXCEPTED = TOOLS["ruff"]["lint"]["per-file-ignores"]


def test_a_commit_is_checked_as_make_lint_checks() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    wanted = re.findall(r"^\t\$\(BIN\)/(.*?)(?: \.)?$", recipe[1], re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"entry: \.venv/bin/(.*?)(?: --force-exclude)?$", hooks, re.MULTILINE)
    assert len(wanted) == recipe[1].count("\n")
    assert found == wanted


def test_mypy_checks_every_folder_with_code() -> None:
    folders = {
        folder.name
        for folder in ROOT.iterdir()
        if not folder.name.startswith(".")
        and not (folder / "pyvenv.cfg").exists()
        and next(folder.rglob("*.py"), None)
    }
    assert folders == {Path(each).parts[0] for each in TOOLS["mypy"]["files"]}


@pytest.mark.parametrize("pattern", EXCEPTED)
def test_what_a_rule_spares_is_there(pattern: str) -> None:
    assert next(ROOT.glob(f"{pattern}/*.py" if pattern.endswith("**") else pattern), None)
