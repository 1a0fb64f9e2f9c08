"""Options that several commands of `moesim` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from moepolicy.amounts import NoAmountError, parse_bytes
from moepolicy.completion import among, known_policies
from moepolicy.console import say
from moeroute.options import SizeOptions, complete_precisions, complete_traces

POLICY_HELP = (
    "Policies to compare: a name (see 'moesim policies'), name:parameter=value,..., "
    "path/to/file.py:Class, or parts put together: 'lru+gate(n=2)'."
)
TOKENS_HELP = "Replay only this many tokens of the trace."
ENGINE_HELP = "simpy is the reference, replay the fast loop. The results are equal."


def scopes() -> list[str]:
    """The scopes that a cache may have."""
    return ["layer", "global"]


PolicyNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="POLICY",
        help=POLICY_HELP,
        show_default=False,
        autocompletion=among(known_policies),
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="One cache a layer, or one for all layers: layer, global.",
        autocompletion=among(scopes),
    ),
]


def slots_option(
    how: str, default: str = "a quarter, half and three quarters of a layer's experts."
) -> Any:
    """--slots; ``how`` says how the experts cached per layer are given."""
    return typer.Option(
        help=f"Experts cached per layer{how} Default: {default}",
        show_default=False,
    )


def calibration_option(which: str) -> Any:
    """--calibration; ``which`` says what trace that is by default."""
    return typer.Option(
        help=f"The trace, or file of counts (SGLang, EPLB), of experts' uses for policies{which}",
        show_default=False,
        autocompletion=complete_traces,
    )


def size_option(what: str, complete: Any = None) -> Any:
    """An option in the section of the model's sizes; ``complete`` gives the values of a shell."""
    return typer.Option(
        help=what,
        show_default=False,
        rich_help_panel=SizeOptions.panel,
        autocompletion=complete,
    )


def low_option(which: str) -> Any:
    """--low; ``which`` says what precisions there are."""
    return size_option(
        "A second precision of the experts, for policies that load some misses at a lower one: "
        + which,
        complete_precisions,
    )


def bytes_of(text: str | None, option: str) -> int | None:
    """The bytes that ``option`` was given: 66.7MB, 94MiB or a number. Wrong usage for others."""
    try:
        return None if text is None else parse_bytes(text)
    except NoAmountError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def tell(notes: Iterable[str]) -> None:
    """Print notes about what was asked for on stderr."""
    for note in notes:
        say(f"note: {note}")


Tokens = Annotated[int | None, typer.Option(help=TOKENS_HELP, show_default=False)]
Cold = Annotated[
    bool,
    typer.Option("--cold", help="Begin every sequence with empty caches and a policy made afresh."),
]
