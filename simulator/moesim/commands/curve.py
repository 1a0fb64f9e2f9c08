"""`moesim curve`: hit ratios for every cache size at once, from one pass over the trace."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from moepolicy import policy_names
from moepolicy.completion import among
from moepolicy.tables import Table, wrapped
from moeroute import open_trace
from moeroute.options import TraceName

from moesim import __version__
from moesim.commands.options import Cold, OutputOptions, Scope
from moesim.curves.hit_ratios import LIMIT, ONE_PASS, check_one_pass, hit_curve, shuffled
from moesim.errors import UsageError
from moesim.workload.loading import load_workload


def _with_curves() -> list[str]:
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
    trace: TraceName = "tiny",
    scope: Scope = "layer",
    cold: Cold = False,
    seed: Annotated[int, typer.Option(help="Seed of the shuffled copy of the trace.", min=0)] = 0,
    output: OutputOptions,
) -> None:
    """Print the hit ratio of every cache size, from one pass over the trace.

    A second column has the hit ratio on the same tokens in random order: the difference comes
    from locality, not from the popularity of some experts. The limit is the highest hit ratio
    that a policy without prefetching can have, knowing the future.
    """
    destination = output.checked()
    opened = open_trace(trace)
    workload = load_workload(opened)
    mixed = shuffled(workload, seed)
    refused = _refused(policies)
    curves = {
        name: [hit_curve(of, name, scope, cold=cold) for of in (workload, mixed)]
        for name in dict.fromkeys([*policies, LIMIT])
        if name not in refused
    }
    rows: list[dict[str, Any]] = [
        {
            "policy": policy,
            "slots": slots,
            "scope": scope,
            "hit_ratio": None if policy in refused else float(curves[policy][0][slots]),
            "shuffled_hit_ratio": None if policy in refused else float(curves[policy][1][slots]),
            "limit_hit_ratio": float(curves[LIMIT][0][slots]),
            "shuffled_limit_hit_ratio": float(curves[LIMIT][1][slots]),
            "cold": cold,
            "seed": seed,
            "kind": "simulated",
            "trace": workload.title,
            "trace_sha256": opened.digest,
            "moesim_version": __version__,
            "refused": refused.get(policy),
        }
        for policy in policies
        for slots in range(1, workload.meta.n_experts + 1)
    ]
    when = ", cold at every sequence" if cold else ""
    title = f"Hit ratio in %, cache per {scope}{when}. {opened.title}; shuffled with seed {seed}."
    destination.deliver(rows, lambda: _table(rows, title))


def _refused(policies: list[str]) -> dict[str, str]:
    """Of policies that have no curve, why. Raises UsageError where there is no such policy, or none
    that has one."""
    refused = {}
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
    refused = {row["policy"]: row["refused"] for row in rows if row["refused"]}
    rows = [row for row in rows if not row["refused"]]
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
