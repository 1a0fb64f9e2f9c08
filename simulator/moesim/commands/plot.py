"""The options for a picture of a command's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from moesim.errors import UsageError
from moesim.pictures.drawing import SUFFIXES, check_picture, write_picture


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """A picture of the results, next to the table."""

    panel: ClassVar[str] = "Picture"

    plot: Annotated[
        Path | None,
        typer.Option(
            help=f"Draw the results to this file. The suffix says the format: {', '.join(SUFFIXES)}"
            ". SVG and HTML follow what their reader prefers, light or dark.",
            show_default=False,
        ),
    ] = None
    dark: Annotated[bool, typer.Option("--dark", help="Draw a PNG or PDF for a dark page.")] = False

    def check(self, *, force: bool) -> None:
        """Before the work: raise what says that no picture can be drawn there."""
        if self.dark and (self.plot is None or self.plot.suffix not in (".png", ".pdf")):
            raise UsageError("--dark is of --plot with a PNG or PDF: give --plot FILE.png")
        check_picture(self.plot, force=force)

    def write(self, chart: Callable[[], dict[str, Any]], title: str) -> None:
        """Draw the chart that ``chart`` makes, where a picture is asked for."""
        if self.plot is not None:
            write_picture(self.plot, chart(), title, dark=self.dark)
