"""`moesim policies`: which policies there are, and what one of them does."""

from __future__ import annotations

from typing import Annotated

import typer
from moepolicy import PolicySpec, find_policy, policy_names
from moepolicy.apps import OutputOptions
from moepolicy.catalogue import (
    built_in,
    catalogue,
    catalogue_table,
    description,
    entry_of,
    markdown,
)
from moepolicy.completion import among
from moepolicy.composition import parts_of
from moepolicy.console import CommandUsageError, emit
from moepolicy.library import PARTS


def policies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[POLICY]",
            help="Print this policy's rule and parameters: a name, or path/to/file.py:Class. "
            "Without it all policies are listed.",
            show_default=False,
            autocompletion=among(policy_names),
        ),
    ] = None,
    *,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print the page docs/policies.md: the built-in policies in full."
        ),
    ] = False,
    output: OutputOptions,
) -> None:
    """List the policies there are, or print one's rule, parameters, needs and paper."""
    if as_markdown:
        if name is not None or output != OutputOptions():
            raise CommandUsageError("--markdown takes no policy and no other option")
        emit(markdown(built_in()))
        return
    destination = output.checked()
    if name is None:
        entries = catalogue()
        destination.deliver([one.row() for one in entries], lambda: catalogue_table(entries))
    else:
        entries = [entry_of(spec) for spec in _parts(name)]
        rows = [entry.row() | {"rule": entry.rule} for entry in entries]
        destination.deliver(rows, lambda: "\n".join(map(description, entries)))


def _parts(name: str) -> list[PolicySpec]:
    """The policy of a name, or the parts that it is made of."""
    if name in PARTS:
        return [PolicySpec(name, PARTS[name])]
    return parts_of(find_policy(name))
