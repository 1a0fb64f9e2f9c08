"""`moesim check`: what must hold of every policy, held against one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among, known_policies
from moepolicy.console import FAILED
from moepolicy.lists import names
from moepolicy.tables import described
from rich.console import Console

from moesim.conformance import CHECK_NAMES

if TYPE_CHECKING:
    from moesim.conformance import CheckResult


def _checks() -> dict[str, str]:
    from moesim.conformance import CHECKS

    return {name: (check.__doc__ or "").split("\n\n")[0] for name, check in CHECKS.items()}


def check(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help="The policy: a name, name:parameter=value,..., or path/to/file.py:Class.",
            show_default=False,
            autocompletion=among(known_policies),
        ),
    ],
    *,
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Only these checks, separated by commas: {', '.join(CHECK_NAMES)}.",
            show_default=False,
            autocompletion=among(_checks),
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the routing and of the clocks that it runs under.", min=0)
    ] = 0,
    output: OutputOptions,
) -> None:
    """Put a policy through the checks that all policies pass; exit code 1 if one does not hold.

    The rules of the cache under any clock, equal runs under one seed, changes of the cache's size,
    SimPy against the replay, simulated against live, the limit, memory that does not grow, the
    time of a step, and compiled against interpreted. All run on small routing made from the seed.
    """
    from moesim.conformance import Status, check_policy

    destination = output.checked()
    wanted = list(CHECK_NAMES) if only is None else names(only)
    console = Console(stderr=True)
    results = []
    for result in check_policy(policy, wanted, seed=seed):
        results.append(result)
        if console.is_terminal:
            console.print(f"{result.check}: {result.status.value}", highlight=False)
    destination.deliver([asdict(one) for one in results], lambda: _lines(results))
    if any(one.status is Status.failed for one in results):
        raise typer.Exit(FAILED)


def _lines(results: Sequence[CheckResult]) -> str:
    """A line for each check: what came of it, its name, and what there is to say."""
    width = max(len(one.check) for one in results)
    return described(
        {f"{one.status.value:6}  {one.check:{width}}": _said(one, results) for one in results}
    )


def _said(result: CheckResult, results: Sequence[CheckResult]) -> str:
    """A failure that stopped an earlier check as well is told once."""
    from moesim.conformance import Status

    for earlier in results[: results.index(result)]:
        if earlier.status is result.status is Status.failed and earlier.said == result.said:
            return f"as {earlier.check}"
    return result.said
