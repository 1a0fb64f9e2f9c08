"""The notebooks of examples/ run from their first cell to their last, and are committed clean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MOST_BYTES = 120_000


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["choose-a-policy", "policy-of-your-own"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_of_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] is None for cell in code)
    assert not [one for cell in code for one in cell["outputs"] if one.get("name") == "stderr"]
    assert "error" not in {one["output_type"] for cell in code for one in cell["outputs"]}
    assert any("<svg" in "".join(part) for cell in code for part in html_of(cell))


def html_of(cell: dict[str, Any]) -> list[list[str]]:
    shown = [one.get("data", {}) for one in cell["outputs"]]
    return [data["text/html"] for data in shown if "text/html" in data]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    # The kernel is ipykernel's.
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    for before, after in zip(cells(path), notebook.cells, strict=True):
        if before["cell_type"] == "code":
            kinds = [one["output_type"] for one in before["outputs"]]
            told = [one for one in after.outputs if one.get("name") != "stderr"]
            assert [one["output_type"] for one in told] == kinds
