"""The pages that people read (README.md and docs/), and the commands, tables and files in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PROGRAM = r"(?:moetrace|moesim|moerun|make|curl|python|pip|uv|git|docker) "
SHELL = ("bash", "sh", "console")
# The mark, in a comment behind a command, of one that brings much over the network.
DOWNLOADS = "downloads"


class Command(NamedTuple):
    """A command of a page, on one line, and what its comment says."""

    text: str
    comment: str = ""


class Block(NamedTuple):
    """A block of code: its language where the page names one, and its lines without indentation."""

    language: str
    lines: list[str]


def pages() -> dict[str, str]:
    """The text of every page, by its path in the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def blocks(text: str) -> Iterator[Block]:
    """The blocks of code of a page: fenced ones, and those that four blanks indent."""
    lines: list[str] = []
    fence: str | None = None
    for line in [*text.splitlines(), "end"]:
        if fence is not None:
            if line.strip() == "```":
                yield Block(fence, lines)
                lines, fence = [], None
            else:
                lines.append(line)
        elif line.startswith("    ") or (lines and not line.strip()):
            lines.append(line.removeprefix("    "))
        else:
            if lines:
                yield Block("", lines)
                lines = []
            if line.startswith("```"):
                fence = line.removeprefix("```").strip()


def _shell_lines(lines: list[str]) -> Iterator[str]:
    """Lines, with those that a backslash carries on made one."""
    whole = ""
    for line in lines:
        whole += line.strip()
        if whole.endswith("\\"):
            whole = whole.removesuffix("\\").rstrip() + " "
            continue
        yield whole
        whole = ""


def _commands_of(line: str) -> Iterator[Command]:
    """The commands of a line: ``;`` parts them, and a # explains them."""
    line, _, comment = line.removeprefix("$ ").partition("  #")
    for part in re.split(rf"; *(?={PROGRAM})", line):
        if re.match(PROGRAM, part.strip()):
            yield Command(part.strip(), comment.strip())


def commands(text: str) -> list[Command]:
    """The commands of a page: lines of code, and code in sentences that has options."""
    found = []
    for block in blocks(text):
        for line in _shell_lines(block.lines):
            here = list(_commands_of(line))
            told = not line or line.startswith(("#", "cd ", "source "))
            assert here or told or block.language not in SHELL, f"no program known: {line}"
            found += here
    for code in re.findall(f"`({PROGRAM}[^`]*--[^`]*)`", text):
        found.append(Command(" ".join(code.split())))
    return list({command.text: command for command in reversed(found)}.values())[::-1]


def snippet(text: str, first: str) -> str:
    """The code from the line that begins with ``first`` to the first command after it."""
    for block in blocks(text):
        begins = [at for at, line in enumerate(block.lines) if line.startswith(first)]
        if begins:
            lines = block.lines[begins[0] :]
            end = next((i for i, line in enumerate(lines) if re.match(PROGRAM, line)), len(lines))
            return "\n".join(lines[:end]).strip() + "\n"
    raise AssertionError(f"no block has a line that begins with {first}")


def printed_under(text: str, command: str) -> list[list[str]]:
    """The cells of the table that a page shows after ``command``, in its block or in the next."""
    found = False
    for block in blocks(text):
        lines = list(_shell_lines(block.lines))
        rest = lines if found else []
        for at, line in enumerate(lines):
            if command in (one.text for one in _commands_of(line)):
                found, rest = True, lines[at + 1 :]
        rows = [line.split() for line in rest if line and not re.match(PROGRAM, line)]
        if rows:
            return rows
    raise AssertionError(f"no table after {command}")
