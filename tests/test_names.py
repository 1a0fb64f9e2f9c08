"""A name means one thing in all five packages: constants have one value, classes one meaning."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from moepolicy import Call, Kind

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "traces/moeroute",
    "policies/moepolicy",
    "simulator/moesim",
    "runtime/moerun",
    "tracer/moetrace",
)
# Names whose meaning is their module's, and why.
CONSTANTS: dict[str, str] = {}
CLASSES = {"UsageError": "every package has its own, to be caught with its other errors"}


def files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def constants(text: str) -> Iterator[tuple[str, float]]:
    """The module's constants that are numbers, as far as they can be worked out from it alone."""
    known: dict[str, Any] = {"np": np, "Kind": Kind, "Call": Call, "int": int}
    for node in ast.parse(text).body:
        for target, value in assigned(node):
            if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target):
                continue
            try:
                found = eval(
                    compile(ast.Expression(value), "", "eval"), {"__builtins__": {}}, known
                )
            except Exception:
                continue  # made of what is imported: not a number of its own
            known[target] = found
            if isinstance(found, (int, float, np.number)) and not isinstance(found, bool):
                yield target, float(found)


def assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement assigns, and to what."""
    if isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
        yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
                yield from ((one.id, value) for one, value in pairs if isinstance(one, ast.Name))


def with_two_values(texts: dict[str, str]) -> dict[str, dict[float, list[str]]]:
    """The constants that have several values, each with the modules that give it."""
    found: dict[str, dict[float, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, text in texts.items():
        for name, value in constants(text):
            found[name][value].append(module)
    return {name: dict(values) for name, values in found.items() if len(values) > 1}


def test_no_constant_has_two_values() -> None:
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files()}
    assert {name: at for name, at in with_two_values(texts).items() if name not in CONSTANTS} == {}
    assert with_two_values({"a": "NOTHING = -1\n", "b": "NOTHING = 0\n"}) == {
        "NOTHING": {-1.0: ["a"], 0.0: ["b"]}
    }
    one = dict(constants("A, B = int(Kind.HIT), 1 << 3\nC: int = B + 1\nD = sys.maxsize\n"))
    assert one == {"A": 0.0, "B": 8.0, "C": 9.0}


def test_no_class_of_the_simulator_or_the_policies_shares_its_name() -> None:
    found = defaultdict(list)
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name not in CLASSES:
                found[node.name].append(str(file.relative_to(ROOT)))
    shared = {
        name: at
        for name, at in found.items()
        if len(at) > 1 and any(one.startswith(("policies", "simulator")) for one in at)
    }
    assert shared == {}
