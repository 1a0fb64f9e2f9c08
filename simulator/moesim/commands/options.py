"""Options that several commands of `moesim` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from moepolicy import policy_names
from moepolicy.apps import Force
from moepolicy.completion import among
from moepolicy.outputs import FORMATS, Output
from moepolicy.tables import Format

POLICY_HELP = (
    "Policies to compare: a name (see 'moesim policies'), name:parameter=value,..., or "
    "path/to/file.py:Class."
)
TOKENS_HELP = "Replay only this many tokens of the trace."


def scopes() -> list[str]:
    """The scopes that a cache may have."""
    return ["layer", "global"]


PolicyNames = Annotated[
    list[str],
    typer.Argument(
        metavar="POLICY",
        help=POLICY_HELP,
        show_default=False,
        autocompletion=among(policy_names),
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="One cache a layer, or one for all layers: layer, global.",
        autocompletion=among(scopes),
    ),
]
Tokens = Annotated[int | None, typer.Option(help=TOKENS_HELP, show_default=False)]
Cold = Annotated[
    bool,
    typer.Option("--cold", help="Begin every sequence with empty caches and a policy made afresh."),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How and where results are printed."""

    panel: ClassVar[str] = "Output"

    format: Annotated[
        Format | None,
        typer.Option(
            help="How to print the results. Default: table, or what the suffix of --out says.",
            show_default=False,
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the results to this file. The suffix says the format: "
            f"{', '.join(FORMATS)} (.txt: the table).",
            show_default=False,
        ),
    ] = None
    force: Force = False

    def checked(self) -> Output:
        """The file or stdout that results go to. Raises CommandError where that is not possible."""
        return Output.checked(self.out, self.format, force=self.force)
