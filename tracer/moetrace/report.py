"""A trace's statistics as a table for people, or as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence

from moeroute import Trace
from moeroute.summary import Statistic
from rich.console import Console
from rich.table import Table

FIELDS = ("statistic", "parameter", "value", "shuffled")


def render(found: Sequence[Statistic], trace: Trace, format: str) -> str:
    """The statistics in one format; rows of JSON and CSV have the names in FIELDS.

    What a trace is too short to tell is null in JSON, empty in CSV.
    """
    rows = [
        dict(zip(FIELDS, (s.name, s.parameter, _known(s.value), _known(s.shuffled)), strict=True))
        for s in found
    ]
    if format == "json":
        made_by = {"trace": str(trace.path), "sha256": trace.digest, "title": trace.title}
        return json.dumps({**made_by, "statistics": rows}, indent=1) + "\n"
    text = io.StringIO()
    if format == "csv":
        writer = csv.DictWriter(text, fieldnames=FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    table = Table("statistic", "of", header_style="bold")
    for name in ("value", "shuffled"):
        table.add_column(name, justify="right")
    for s in found:
        table.add_row(s.name, s.parameter, _shown(s.value), _shown(s.shuffled))
    Console(file=text, width=None if sys.stdout.isatty() else 100).print(table)
    return f"{trace.describe()}\n{text.getvalue()}"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _shown(value: float | None) -> str:
    known = _known(value)
    return "" if known is None else f"{known:.3f}"
