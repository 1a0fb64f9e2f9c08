"""Tables of numbers in text, as people bring them: a value that is none is told by its line."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moeroute.foreign import Source
from moeroute.importers.findings import Findings
from moeroute.naming import naming_errors
from moeroute.schema import TraceError

if TYPE_CHECKING:
    import polars as pl


def text_lines(source: Source, findings: Findings) -> list[str]:
    """The lines of the text; characters that cannot be decoded are noted."""
    lines = source.lines()
    odd = sum(line.count("\ufffd") for line in lines)
    findings.count("encoding", odd, f"characters are no {source.encoding}: replaced")
    return lines


Kind = int | None | range | type[str]
"""What a column holds: whole numbers from 0 to this, finite real numbers (None), whole numbers of a
range, or text."""


def table_blocks(
    source: Source, kinds: Mapping[str, Kind], findings: Findings, header: str | None = None
) -> Iterator[pl.DataFrame]:
    """A CSV file as `read_table` reads it, some lines at a time.

    `header`: the names of the columns, where the file does not begin with them. Raises TraceError.
    """
    for first, lines in source.blocks():
        if header is None:
            header = next((t for t in lines if (t.strip() or "#")[0] != "#"), None)
            if header is not None and any((t.strip() or "#")[0] != "#" for t in lines[1:]):
                yield read_table(source, lines, kinds, findings)
        elif any((t.strip() or "#")[0] != "#" for t in lines):
            yield read_table(source, [header, *lines], kinds, findings, first - 1)
        findings = Findings()  # what is said of the columns is said once


def read_table(
    source: Source,
    lines: list[str],
    numbers: Mapping[str, Kind],
    findings: Findings,
    first_line: int = 1,
) -> pl.DataFrame:
    """Read CSV: the columns of `numbers`, and `line` (of the file, from 1).

    `numbers` names each column with what it holds. Blank lines and comments (#) are skipped,
    headers are compared without case and outer spaces, commas may be semicolons or tabs. Raises
    TraceError naming line, column, value.
    """
    import polars as pl

    kept = [
        (i, text) for i, text in enumerate(lines, first_line) if (text.strip() or "#")[0] != "#"
    ]
    if len(kept) < 2:
        raise TraceError(f"{source.path}: has no rows{'' if kept else ' and no column names'}")
    with naming_errors(source.path):
        raw = pl.read_csv(
            "\n".join(text for _, text in kept).encode(),
            separator=max(",;\t", key=kept[0][1].count),
            has_header=False,
            infer_schema=False,
        )
    header = [(name or "").strip().lower() for name in raw.row(0)]
    _check_header(source, header, numbers, findings)
    text = raw[1:].rename(dict(zip(raw.columns, map(str, range(len(header))), strict=True)))
    line = pl.Series("line", [i for i, _ in kept[1:]], dtype=pl.Int64)
    if len(text) != len(line):
        raise TraceError(f"{source.path}: a quoted field goes over more than one line")
    columns = []
    for name, most in numbers.items():
        found = text[str(header.index(name))].alias(name).str.strip_chars()
        columns.append(_numbers(source, found, line, most))
    return pl.DataFrame([*columns, line])


def _check_header(
    source: Source, header: list[str], numbers: Mapping[str, Kind], findings: Findings
) -> None:
    if absent := [name for name in numbers if name not in header]:
        raise TraceError(f"{source.path}: no column {absent[0]}; it has {', '.join(header)}")
    counts = collections.Counter(header)
    if twice := [name for name in numbers if counts[name] > 1]:
        raise TraceError(f"{source.path}: column {twice[0]} is there {counts[twice[0]]} times")
    if others := [name for name in header if name not in numbers]:
        findings.note("not_imported", "columns " + ", ".join(others))


def _numbers(source: Source, found: pl.Series, line: pl.Series, kind: Kind) -> pl.Series:
    """The column as Float32, as text, or as whole Int64 within bounds."""
    import polars as pl

    if kind is str:
        return found
    bounds = range(kind + 1) if isinstance(kind, int) else kind
    most = None if bounds is None else bounds.stop - 1  # type: ignore[union-attr]
    least = 0 if bounds is None else bounds.start  # type: ignore[union-attr]
    values = found.cast(pl.Float64, strict=False)
    number = values.is_finite().fill_null(False)
    good = number
    if most is not None:
        good = number & (values >= least) & (values <= most) & (values.floor() == values)
    if not good.all():
        row = int((~good).arg_max() or 0)
        wrong = f"is out of range, not a whole number of {least}..{most}"
        raise TraceError(
            f"{source.path}: line {line[row]}, column {found.name}: {found[row]!r} "
            f"{wrong if number[row] else 'is no number that belongs there'}"
        )
    return values.cast(pl.Float32 if most is None else pl.Int64)
