"""`moesim curve`: hit ratios for every cache size at once, from one pass over the trace."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from moepolicy.outputs import Output
from moepolicy.tables import Table, wrapped
from moeroute import open_trace

from moesim import __version__
from moesim.commands.options import Force, ResultFile, ResultFormat
from moesim.curves.hit_ratios import LIMIT, hit_curve, shuffled
from moesim.workload.loading import load_workload


def curve(
    policies: Annotated[
        list[str],
        typer.Argument(metavar="POLICY...", help="Any of lru, lfu, belady, belady-bypass."),
    ],
    trace: Annotated[
        str, typer.Option(help="A trace file, or the name of a sample: tiny, mixtral-like.")
    ] = "tiny",
    scope: Annotated[
        str, typer.Option(help="One cache a layer, or one for all: layer, global.")
    ] = "layer",
    cold: Annotated[
        bool, typer.Option("--cold", help="Empty the caches with every sequence.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the shuffled copy of the trace.", min=0)] = 0,
    format: ResultFormat = None,
    out: ResultFile = None,
    force: Force = False,
) -> None:
    """Print the hit ratio of every cache size, from one pass over the trace.

    Beside each stands the hit ratio on the same tokens in random order: what is above it is owed
    to locality, not to some experts being popular. The limit is the highest hit ratio that a
    policy without prefetching could have, knowing the future.
    """
    output = Output.checked(out, format, force=force)
    opened = open_trace(trace)
    workload = load_workload(opened)
    mixed = shuffled(workload, seed)
    curves = {
        name: [hit_curve(of, name, scope, cold=cold) for of in (workload, mixed)]
        for name in dict.fromkeys([*policies, LIMIT])
    }
    rows: list[dict[str, Any]] = [
        {
            "policy": policy,
            "slots": slots,
            "scope": scope,
            "hit_ratio": float(curves[policy][0][slots]),
            "shuffled_hit_ratio": float(curves[policy][1][slots]),
            "limit_hit_ratio": float(curves[LIMIT][0][slots]),
            "shuffled_limit_hit_ratio": float(curves[LIMIT][1][slots]),
            "cold": cold,
            "seed": seed,
            "kind": "simulated",
            "trace": workload.title,
            "trace_sha256": opened.digest,
            "moesim_version": __version__,
        }
        for policy in policies
        for slots in range(1, workload.meta.n_experts + 1)
    ]
    when = ", cold at every sequence" if cold else ""
    title = f"Hit ratio in %, cache per {scope}{when}. {opened.title}; shuffled with seed {seed}."
    output.deliver(rows, lambda: _table(rows, title))


def _table(rows: list[dict[str, Any]], title: str) -> str:
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
    return f"{wrapped([title])}\n{table.render()}"
