"""`moesim policies`: which policies there are, and what one of them does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among, known_policies
from moepolicy.console import CommandUsageError, emit

if TYPE_CHECKING:
    from moepolicy import PolicySpec


def policies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[POLICY]",
            help="Print this policy's rule and parameters: a name, or path/to/file.py:Class. "
            "Without it all policies are listed.",
            show_default=False,
            autocompletion=among(known_policies),
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
    from moepolicy.catalogue import (
        built_in,
        catalogue,
        catalogue_table,
        description,
        entry_of,
        markdown,
    )

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
    from moepolicy import PolicySpec, find_policy
    from moepolicy.composition import parts_of
    from moepolicy.library import PARTS

    if name in PARTS:
        return [PolicySpec(name, PARTS[name])]
    return parts_of(find_policy(name))
