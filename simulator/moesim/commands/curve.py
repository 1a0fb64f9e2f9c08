"""`moesim curve`: hit ratios for every cache size at once, from one pass over the trace."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from moepolicy.amounts import cache_of
from moepolicy.apps import OutputOptions
from moepolicy.completion import among
from moepolicy.progress import watched
from moepolicy.refusals import REFUSED, Refusals, empty_row, ran, refused_row
from moepolicy.tables import Table, wrapped
from moeroute.options import TraceName

from moesim import __version__
from moesim.commands.options import Cold, Scope
from moesim.commands.plot import PlotOptions
from moesim.errors import UsageError
from moesim.workload import DEFAULT_TRACE

if TYPE_CHECKING:
    import numpy as np
    from moeroute import Trace
    from numpy.typing import NDArray

    from moesim.workload.steps import Workload

COLUMNS = ("policy", "slots", "scope", "hit_ratio", "shuffled_hit_ratio")  # the others follow


def _with_curves() -> list[str]:
    from moesim.curves.hit_ratios import ONE_PASS

    return list(ONE_PASS)


def curve(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICY",
            help="Policies to show: any of lru, lfu, belady, belady-bypass.",
            autocompletion=among(_with_curves),
        ),
    ],
    *,
    trace: TraceName = DEFAULT_TRACE,
    scope: Scope = "layer",
    cold: Cold = False,
    seed: Annotated[int, typer.Option(help="Seed of the shuffled copy of the trace.", min=0)] = 0,
    plot: PlotOptions,
    output: OutputOptions,
) -> None:
    """Print the hit ratio of every cache size, from one pass over the trace.

    A second column has the hit ratio on the same tokens in random order: the difference comes
    from locality, not from the popularity of some experts. The limit is the highest hit ratio
    that a policy without prefetching can have, knowing the future.
    """
    from moeroute import open_trace

    from moesim.curves.hit_ratios import LIMIT, hit_curve
    from moesim.pictures.tables import curves

    destination = output.checked()
    plot.check(force=output.force)
    opened = open_trace(trace)
    refused = _refused(policies)
    workload, mixed = _workloads(opened, seed)
    wanted = [name for name in dict.fromkeys([*policies, LIMIT]) if name not in refused]
    found = {
        name: [hit_curve(of, name, scope, cold=cold) for of in (workload, mixed)]
        for name in watched("curve", "policy", ((name, name) for name in wanted), len(wanted))
    }
    common = {
        "scope": scope,
        "cold": cold,
        "seed": seed,
        "kind": "simulated",
        "trace": workload.title,
        "trace_sha256": opened.digest,
        "moesim_version": __version__,
    }
    rows = [
        _row(policy, slots, found, refused, common)
        for policy in policies
        for slots in range(1, workload.meta.n_experts + 1)
    ]
    when = ", cold at every sequence" if cold else ""
    plot.write(
        lambda: curves(rows, f"simulated, {opened.meta.source} routing", opened.title),
        "Hit ratio by cache size",
    )
    title = f"Hit ratio in %, {cache_of(scope)}{when}. {opened.title}; shuffled with seed {seed}."
    destination.deliver(rows, lambda: _table(rows, title))


def _workloads(trace: Trace, seed: int) -> tuple[Workload, Workload]:
    """The trace's steps, and the same tokens in random order. A long trace lies in files of the
    system's folder for temporary ones, which are mapped."""
    from moesim.curves.hit_ratios import shuffled
    from moesim.simulation import IN_MEMORY
    from moesim.workload.loading import load_workload

    if trace.n_rows <= IN_MEMORY:
        workload = load_workload(trace)
        return workload, shuffled(workload, seed)
    with TemporaryDirectory(prefix="moesim-") as scratch:
        for name in ("steps", "shuffled"):
            Path(scratch, name).mkdir()
        workload = load_workload(trace, folder=Path(scratch, "steps"))
        return workload, shuffled(workload, seed, Path(scratch, "shuffled"))


def _row(
    policy: str,
    slots: int,
    curves: dict[str, list[NDArray[np.float64]]],
    refused: Refusals,
    common: dict[str, Any],
) -> dict[str, Any]:
    """One point of a policy's curve; ``curves`` are of the trace and of its shuffled copy."""
    from moesim.curves.hit_ratios import LIMIT

    limit, shuffled_limit = (float(of[slots]) for of in curves[LIMIT])
    known = {
        "policy": policy,
        "slots": slots,
        "limit_hit_ratio": limit,
        "shuffled_limit_hit_ratio": shuffled_limit,
        **common,
    }
    if policy in refused:
        return refused_row(COLUMNS, known, refused[policy])
    own, shuffled_own = (float(of[slots]) for of in curves[policy])
    return ran(empty_row(COLUMNS, known | {"hit_ratio": own, "shuffled_hit_ratio": shuffled_own}))


def _refused(policies: list[str]) -> Refusals:
    """Of policies that have no curve, why. Raises UsageError where there is no such policy, or none
    that has one."""
    from moepolicy import policy_names

    from moesim.curves.hit_ratios import check_one_pass

    refused: Refusals = {}
    for name in dict.fromkeys(policies):
        try:
            check_one_pass(name)
        except UsageError as error:
            refused[name] = str(error)
            if name.partition(":")[0] not in policy_names() and ".py:" not in name:
                raise
    if len(refused) == len(set(policies)):
        check_one_pass(policies[0])
    return refused


def _table(rows: list[dict[str, Any]], title: str) -> str:
    refused = {row["policy"]: row[REFUSED] for row in rows if row[REFUSED]}
    rows = [row for row in rows if not row[REFUSED]]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    headings = [name for policy in [*policies, "limit"] for name in (policy, f"{policy}\nshuffled")]
    table = Table(["slots a layer"], headings, right=["slots a layer"])
    for slots in sorted({row["slots"] for row in rows}):
        here = {row["policy"]: row for row in rows if row["slots"] == slots}
        ratios = [
            here[policy][name]
            for policy in policies
            for name in ("hit_ratio", "shuffled_hit_ratio")
        ]
        any_row = here[policies[0]]
        ratios += [any_row["limit_hit_ratio"], any_row["shuffled_limit_hit_ratio"]]
        table.add_row(str(slots), *(f"{100 * ratio:.1f}" for ratio in ratios))
    notes = wrapped([f"{policy}: no column: {why}" for policy, why in refused.items()])
    return f"{wrapped([title])}\n{table.render()}{notes}"
