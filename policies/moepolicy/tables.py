"""Rows of results as a table for people, or as JSON and CSV for programs.

Every command renders its rows here. A table never cuts a name or a number: columns that do not fit
the width follow in a second block under the first, with the names repeated.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len

PIPED_WIDTH = 100  # columns where stdout is no terminal and COLUMNS is not set
GAPS = (2, 1)  # blanks between columns: the most that needs no second block
INDENT = 2


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


def table_width() -> int:
    """Columns that a table may take: COLUMNS, else the terminal's, else ``PIPED_WIDTH``."""
    return shutil.get_terminal_size((PIPED_WIDTH, 24)).columns


class Table:
    """Rows under headings. The ``keys`` name a row and are repeated where the columns are split.

    ``left`` are the columns of words, aligned on the left; the keys are such columns unless they
    are in ``right``. A heading may have several lines.
    """

    def __init__(
        self,
        keys: Sequence[str],
        columns: Sequence[str],
        *,
        left: Iterable[str] = (),
        right: Iterable[str] = (),
    ) -> None:
        self.headings = [*keys, *columns]
        self.n_keys = len(keys)
        words = (set(keys) | set(left)) - set(right)
        self._is_left = [name in words for name in self.headings]
        self._sections: list[list[list[str]]] = [[]]

    def add_row(self, *cells: str) -> None:
        """One cell for each heading; ValueError where there are more or fewer."""
        if len(cells) != len(self.headings):
            raise ValueError(f"{len(cells)} cells under {len(self.headings)} headings")
        self._sections[-1].append([_one_line(cell) for cell in cells])

    def end_section(self) -> None:
        """Leave a blank line before the next row."""
        self._sections.append([])

    def render(self, width: int | None = None) -> str:
        """The table, within ``width`` columns unless a single name or number is longer."""
        width = width or table_width()
        splits = [(blocks, gap) for gap in GAPS if (blocks := self._blocks(width, gap))]
        if not splits:
            return self._tall(width)
        blocks, gap = min(splits, key=lambda split: len(split[0]))  # the first of equals
        return "\n".join(self._block(block, gap) for block in blocks)

    @property
    def _rows(self) -> list[list[str]]:
        return [row for section in self._sections for row in section]

    def _widths(self) -> list[int]:
        return [
            max(map(cell_len, [*heading.split("\n"), *(row[i] for row in self._rows)]))
            for i, heading in enumerate(self.headings)
        ]

    def _blocks(self, width: int, gap: int) -> list[list[int]] | None:
        """The columns of each block, keys included; None where one does not fit beside the keys."""
        widths = self._widths()
        keys = list(range(self.n_keys))
        begin = sum(widths[i] for i in keys) + gap * (len(keys) - 1)
        blocks, taken = [list(keys)], begin
        if begin > width:
            return None
        for i in range(self.n_keys, len(widths)):
            if taken + gap + widths[i] > width:
                if len(blocks[-1]) == len(keys) or begin + gap + widths[i] > width:
                    return None
                blocks.append(list(keys))
                taken = begin
            blocks[-1].append(i)
            taken += gap + widths[i]
        return blocks

    def _block(self, columns: Sequence[int], gap: int) -> str:
        widths = self._widths()
        rule = "-" * (sum(widths[i] for i in columns) + gap * (len(columns) - 1))

        def line(cells: Sequence[str]) -> str:
            aligned = []
            for i, cell in zip(columns, cells, strict=True):
                blanks = " " * (widths[i] - cell_len(cell))
                aligned.append(cell + blanks if self._is_left[i] else blanks + cell)
            return (" " * gap).join(aligned).rstrip()

        # A heading of fewer lines stands over its column, not over the others' first lines.
        upwards = [self.headings[i].split("\n")[::-1] for i in columns]
        heads = [line(cells) for cells in zip_longest(*upwards, fillvalue="")][::-1]
        sections = [
            "".join(f"{line([row[i] for i in columns])}\n" for row in section)
            for section in self._sections
            if section
        ]
        return "\n".join([*heads, rule]) + "\n" + "\n".join(sections)

    def _tall(self, width: int) -> str:
        """A row's names on a line of their own, its other cells under them with their headings."""
        lines = []
        for section in self._sections:
            for row in section:
                lines.append("  ".join(cell for cell in row[: self.n_keys] if cell))
                pairs = [
                    f"{heading.replace(chr(10), ' ')} {cell}"
                    for heading, cell in list(zip(self.headings, row, strict=True))[self.n_keys :]
                    if cell
                ]
                lines += _packed(pairs, width)
        names = "  ".join(name.replace("\n", " ") for name in self.headings[: self.n_keys])
        rule = "-" * min(cell_len(names), width)
        return "".join(f"{line.rstrip()}\n" for line in [names, rule, *lines])


def _packed(pairs: Sequence[str], width: int) -> list[str]:
    """As many of ``pairs`` to an indented line as fit; one that is wider is broken at its words."""
    lines: list[str] = []
    for pair in pairs:
        if lines and cell_len(lines[-1]) + INDENT + cell_len(pair) <= width:
            lines[-1] += " " * INDENT + pair
        else:
            lines += _wrapped_lines(" " * INDENT + pair, width)
    return lines


def _one_line(cell: str) -> str:
    """A cell without line breaks and other control characters, which would break its row."""
    return "".join(c if c.isprintable() else " " for c in cell)


def wrapped(notes: Iterable[str], width: int | None = None) -> str:
    """Sentences within the width, each from a line of its own; no word or number is broken.

    A note keeps its indentation; its further lines are indented by two more.
    """
    return "".join(f"{line}\n" for note in notes for line in _wrapped_lines(note, width))


def _wrapped_lines(note: str, width: int | None) -> list[str]:
    indent = re.match(" *", note)
    assert indent is not None
    return textwrap.wrap(
        note.strip(),
        width or table_width(),
        initial_indent=indent[0],
        subsequent_indent=indent[0] + " " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def described(items: Mapping[str, str], width: int | None = None) -> str:
    """Names with a description each, beside them or, where that is too narrow, under them."""
    width = width or table_width()
    widest = max(map(cell_len, items), default=0)
    beside = widest + INDENT
    if beside > width // 2:
        indent = " " * INDENT
        return "".join(
            f"{name.rstrip()}\n{wrapped([indent + text], width)}" for name, text in items.items()
        )
    lines = []
    for name, text in items.items():
        first, *more = _wrapped_lines(text, width - beside)
        lines.append(f"{name}{' ' * (beside - cell_len(name))}{first}".rstrip())
        lines += [" " * beside + line.strip() for line in more]
    return "".join(f"{line}\n" for line in lines)


def html_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under headings as a table of HTML, which a notebook shows."""

    def line(kind: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(c))}</{kind}>" for c in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', headings)}</thead><tbody>{body}</tbody></table>"


def to_json(document: Any) -> str:
    """``document`` as JSON; what is no finite number is null there, as JSON has no word for it."""
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same names as CSV; the items of a list are separated by blanks."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _flat(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value
