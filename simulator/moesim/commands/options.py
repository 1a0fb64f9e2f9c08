"""Options that several commands of `moesim` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from moepolicy.outputs import FORMATS
from moepolicy.tables import Format

ResultFile = Annotated[
    Path | None,
    typer.Option(
        help=f"Write the results to this file; its suffix says how: {', '.join(FORMATS)} "
        "(.txt: the table).",
        show_default=False,
    ),
]
ResultFormat = Annotated[
    Format | None,
    typer.Option(
        help="How to print the results. Default: table, or what the suffix of --out says.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace a file that lies where one is to be written.")
]
