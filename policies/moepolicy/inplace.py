"""What a policy's methods assign to ``self``, which in compiled code is a tuple of attributes.

``self.uses //= 2`` works on the array that ``uses`` is and then assigns that array to where it is
already. Compiled code leaves the second part out. Any other assignment is beyond it.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

VIEW = "_in_place"  # the local variable that stands for the array


class Store(NamedTuple):
    """A method assigns to an attribute of an object."""

    method: str
    attribute: str
    line: int
    in_place: bool  # by an augmented assignment, which `in_place` rewrites


def stores(cls: type, entries: frozenset[str]) -> list[Store]:
    """All that the methods ``entries`` of ``cls``, and methods that these call, assign."""
    found, seen, left = [], set(), sorted(entries)
    while left:
        name = left.pop()
        method = getattr(cls, name, None)
        if name in seen or not isinstance(method, FunctionType):
            continue
        seen.add(name)
        left += [used for used in method.__code__.co_names if used not in seen]
        rewritten = _rewritten(method.__code__)
        kept = set() if rewritten is None else {line for _, line in _assigned(rewritten)}
        for attribute, line in _assigned(method.__code__):
            found.append(Store(name, attribute, line, rewritten is not None and line not in kept))
    return found


def in_place(function: FunctionType) -> CodeType:
    """The code of ``function`` with ``self.x op= y`` done on the array that ``x`` is."""
    return _rewritten(function.__code__) or function.__code__


def _assigned(code: CodeType) -> Iterator[tuple[str, int]]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
            positions = instruction.positions
            yield instruction.argval, (positions and positions.lineno) or code.co_firstlineno


@cache
def _rewritten(code: CodeType) -> CodeType | None:
    """``code`` compiled anew from its source, rewritten; None where there is nothing to rewrite, or
    where its source is not to be had or another."""
    if code.co_freevars or not code.co_argcount or not any(_assigned(code)):
        return None
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    try:
        source = textwrap.dedent("".join(inspect.getblock(lines)))
        as_it_stands, tree = ast.parse(source), ast.parse(source)
        same = _compiled(as_it_stands, code)
        changed = _compiled(_InPlace(code.co_varnames[0]).visit(tree), code)
    except (SyntaxError, IndentationError, IndexError, ValueError):
        return None
    alike = same is not None and _what(same) == _what(code)
    return changed if alike else None


def _what(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_varnames


def _compiled(tree: Any, like: CodeType) -> CodeType | None:
    tree.body[0].decorator_list = []
    ast.increment_lineno(ast.fix_missing_locations(tree), like.co_firstlineno - 1)
    made = compile(tree, like.co_filename, "exec", dont_inherit=True)
    return next((c for c in made.co_consts if isinstance(c, CodeType)), None)


class _InPlace(ast.NodeTransformer):
    """``self.x op= y`` becomes ``view = self.x[:]; view op= y``, which no number takes part in."""

    def __init__(self, name: str) -> None:
        self._self = name

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        target = node.target
        if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)):
            return node
        if target.value.id != self._self:
            return node
        array = ast.Attribute(ast.Name(self._self, ast.Load()), target.attr, ast.Load())
        view = ast.Subscript(array, ast.Slice(), ast.Load())
        take: ast.stmt = ast.Assign([ast.Name(VIEW, ast.Store())], view)
        work: ast.stmt = ast.AugAssign(ast.Name(VIEW, ast.Store()), node.op, node.value)
        return [ast.copy_location(take, node), ast.copy_location(work, node)]
