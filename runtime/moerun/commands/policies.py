"""`moerun policies`: which policies there are, and which of them run live."""

from __future__ import annotations

from typing import Annotated

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among

from moerun.commands import names


def policies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[POLICY]",
            help="Print this policy's rule and parameters: a name, or path/to/file.py:Class. "
            "Without it all policies are listed.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None,
    *,
    output: OutputOptions,
) -> None:
    """List the policies there are, and say which of them run live, and why not; or print one."""
    from moepolicy import find_policy
    from moepolicy.catalogue import catalogue, catalogue_table, description, entry_of

    from moerun.policies import live_needs

    destination = output.checked()
    entries = catalogue() if name is None else [entry_of(find_policy(name))]
    runs = {entry.name: live_needs(entry.needs) for entry in entries}
    rows = [
        entry.row() | {"runs_live": runs[entry.name].runs, "why": runs[entry.name].why}
        for entry in entries
    ]

    def table() -> str:
        if name is None:
            return catalogue_table(entries, {one: found.shown for one, found in runs.items()})
        (entry,) = entries
        return description(entry, {"runs live": runs[entry.name].shown})

    destination.deliver(rows, table)
