"""Docstrings as Markdown: a list whose terms and meanings stand in two columns becomes a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension

TERM = re.compile(r"^(\w[\w, ()|]*?) {2,}(\S.*)$")


class TwoColumns(Extension):
    """Turns ``name   what it is`` lines, with deeper lines that go on, into items of a list."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of whatever griffe has found."""
        if obj.docstring is not None:
            held: Docstring = obj.docstring
            held.value = as_list(held.value)


def as_list(text: str) -> str:
    """``text`` with its two-column blocks as Markdown lists."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        term = TERM.match(line)
        if term:
            if not inside and lines and lines[-1]:
                lines.append("")
            lines.append(f"- **{term[1]}**: {term[2]}")
            inside = True
        elif inside and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines)
