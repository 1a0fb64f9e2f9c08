"""A picture of results for Python: shown in a notebook, or saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError
from moesim.pictures.drawing import drawn, require_plots, write_picture
from moesim.pictures.tables import compared, curves, swept

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, repr=False)
class Picture:
    """A chart, as a Vega-Lite specification. A notebook shows it; light or dark as its reader
    prefers."""

    chart: dict[str, Any]
    title: str

    def __repr__(self) -> str:
        return f"Picture({self.title!r})"

    def save(self, path: str | Path, *, dark: bool = False) -> None:
        """Write it as the suffix of ``path`` says: .svg, .png, .pdf or .html. CommandError for
        others; ``dark`` is for PNG and PDF."""
        write_picture(Path(path), self.chart, self.title, dark=dark)

    def _repr_html_(self) -> str:
        return drawn(".svg", self.chart, self.title).decode()


def draw(results: pl.DataFrame | Sequence[dict[str, Any]]) -> Picture:
    """The picture of results: what --plot of compare, curve and sweep draws.

    ``results`` are what `compare` returns, or the rows that one of the commands wrote as CSV, JSON
    or Parquet. Raises SimulationError where pictures cannot be drawn here, or nothing ran, and
    UsageError for rows of something else.
    """
    require_plots()
    rows = list(results) if isinstance(results, Sequence) else results.to_dicts()
    if not rows or "policy" not in rows[0] or "hit_ratio" not in rows[0]:
        raise UsageError("there is nothing to draw: give the rows of compare, curve or sweep")
    if "trace_path" in rows[0]:
        return Picture(swept(rows), "A sweep")
    kind = str(rows[0]["kind"])
    if "shuffled_hit_ratio" in rows[0]:
        return Picture(curves(rows, kind, str(rows[0]["trace"])), "Hit ratio by cache size")
    where = f"{rows[0]['trace']} on {rows[0]['machine']} ({rows[0]['machine_source']} constants)"
    return Picture(compared(rows, kind, where), "Policies compared")
