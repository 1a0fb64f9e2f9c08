"""A trace's statistics as a table for people, or as JSON and CSV for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moepolicy.tables import Format, Table, to_csv, to_json, wrapped
from moeroute import Trace
from moeroute.summary import Statistic

FIELDS = ("statistic", "parameter", "value", "shuffled")


def render(found: Sequence[Statistic], trace: Trace, format: Format) -> str:
    """The statistics in one format; rows of JSON and CSV have the names in FIELDS.

    What a trace is too short to tell is null in JSON, empty in CSV.
    """
    rows = [
        dict(zip(FIELDS, (s.name, s.parameter, _known(s.value), _known(s.shuffled)), strict=True))
        for s in found
    ]
    if format is Format.json:
        made_by = {"trace": str(trace.path), "sha256": trace.digest, "title": trace.title}
        return to_json({**made_by, "statistics": rows})
    if format is Format.csv:
        return to_csv(rows)
    table = Table(["statistic", "of"], ["value", "shuffled"])
    for s in found:
        table.add_row(s.name, s.parameter, _shown(s.value), _shown(s.shuffled))
    return f"{wrapped(trace.describe().splitlines())}\n{table.render()}"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _shown(value: float | None) -> str:
    known = _known(value)
    return "" if known is None else f"{known:.3f}"
