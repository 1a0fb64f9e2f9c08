"""Numba still has the private names that are used of it, and they still do what they did."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
from moepolicy import numba_internals
from moepolicy.numba_internals import NAMES, NO_ALLOCATION, READ_IN, keep_in, start_allocator

ROOT = Path(__file__).parents[2]
PACKAGES = ("policies/moepolicy", "simulator/moesim", "traces/moeroute", "runtime/moerun")


@pytest.mark.parametrize("name", NAMES)
def test_numba_still_has(name: str) -> None:
    module, *inner = name.rpartition(".")[0], name.rpartition(".")[2]
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, first = module.rpartition(".")
            inner.insert(0, first)
    for each in inner:
        assert hasattr(found, each), f"{name} was read in numba {READ_IN}, not {numba.__version__}"
        found = getattr(found, each)


def test_an_option_forbids_arrays() -> None:
    with pytest.raises(numba.NumbaError, match=numba_internals.NEEDS_ALLOCATION):
        numba.njit(lambda n: [n], **{NO_ALLOCATION: False})(1)
    start_allocator()
    assert numba.njit(lambda n: len([n]), **{NO_ALLOCATION: True})(1) == 1


def test_code_is_kept_where_it_is_told_and_found_there_again(tmp_path: Path) -> None:
    told: list[str] = []

    def code(n: int) -> int:
        return n + 1

    for _ in range(2):
        dispatcher = numba.njit(code)
        hooks = (lambda: told.append("used"), lambda: told.append("saved"))
        keep_in(lambda: tmp_path / "kept", "mine", dispatcher, *hooks)
        assert dispatcher(1) == 2
    assert told == ["saved", "used"]  # the second was loaded
    assert sorted(file.suffix for file in (tmp_path / "kept").iterdir()) == [".nbc", ".nbi"]


def touched(file: Path) -> Iterator[str]:
    """The modules inside numba that ``file`` imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numba.core"):
            yield f"{file.name} imports {node.module}"
        elif isinstance(node, ast.Import):
            yield from (
                f"{file.name} imports {alias.name}"
                for alias in node.names
                if alias.name.startswith("numba.core")
            )


def test_no_other_module_reaches_into_numba() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    inside = {line for file in files for line in touched(file)}
    assert {line.split()[0] for line in inside} == {"numba_internals.py"}
    named = {line.split()[-1] for line in inside}
    assert all(any(name.startswith(f"{module}.") for name in NAMES) for module in named)
