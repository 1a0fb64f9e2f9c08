"""Which changes of a module its tests let through: mutation testing with cosmic-ray's operators.

    python benchmarks/mutants.py policies/moepolicy/machine.py tests/policies -k "not compiled"

or `make mutants MODULE=... TESTS=...`, which installs cosmic-ray (it is in no extra). Mutants are
drawn with a seed, those of annotations alone left out; each runs in a copy of the tree, in a
process with a time limit, until its first failing test. What is let through is printed as a diff:
look whether it changes what the module does. With --interpreted nothing is compiled, which is
faster by far, and tests that compile must be left out. Needs a minute a mutant at worst.
"""

from __future__ import annotations

import ast
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
SOURCES = ("traces", "policies", "simulator", "runtime", "tracer")
COPIED = (*SOURCES, "tests", "docs", "pyproject.toml", "README.md", "Makefile")


class WithoutAnnotations(ast.NodeTransformer):
    """Types that are only written down, which tests cannot see."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def meaning(code: str) -> str:
    return ast.dump(WithoutAnnotations().visit(ast.parse(code)))


def mutants(code: str, seed: int) -> list[str]:
    """Every changed form of ``code`` that can be read and says something else, shuffled."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(parso.parse(code)))  # type: ignore[no-untyped-call, unused-ignore]
    operators = [get_operator(name) for name in operator_names()]
    forms: dict[str, str] = {meaning(code): ""}
    for operator in (operator() for operator in operators if not operator.arguments()):
        places = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        for form in (mutate_code(code, operator, place) for place in range(places)):
            with suppress(SyntaxError):
                if form is not None:
                    forms.setdefault(meaning(form), form)
    found = sorted(form for form in forms.values() if form)
    random.Random(seed).shuffle(found)
    return found


def passes(copy: Path, tests: list[str], limit_s: float | None, *, interpreted: bool) -> bool:
    """Whether the tests pass in ``copy``; those that take too long do not."""
    paths = os.pathsep.join(str(copy / source) for source in SOURCES)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": str(int(interpreted))}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, timeout=limit_s, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(
    context: typer.Context,
    module: Annotated[Path, typer.Argument(help="The file to change.")],
    n: Annotated[int, typer.Option("--mutants", help="How many of its mutants to try.")] = 20,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    interpreted: Annotated[bool, typer.Option(help="Compile nothing with numba.")] = False,
) -> None:
    """Change MODULE in a copy of the tree; further arguments are pytest's, such as the tests."""
    code = (ROOT / module).read_text(encoding="utf-8")
    every = mutants(code, seed)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        began_s = time.monotonic()
        if not passes(copy, context.args, None, interpreted=interpreted):
            raise SystemExit("error: the tests fail before anything is changed")
        limit_s = 10 + 3 * (time.monotonic() - began_s)
        survivors = 0
        for form in every[:n]:
            (copy / module).write_text(form, encoding="utf-8")
            if passes(copy, context.args, limit_s, interpreted=interpreted):
                survivors += 1
                lines = difflib.unified_diff(code.splitlines(), form.splitlines(), n=0, lineterm="")
                typer.echo("\n".join(list(lines)[2:]) + "\n")
    typer.echo(
        f"{module}: {survivors} of {min(n, len(every))} let through (of {len(every)} mutants)"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings)(main)
    app()
