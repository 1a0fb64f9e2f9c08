"""`moesim table2`: the base paper's Table 2, fitted on one half and predicted on the other."""

from __future__ import annotations

from typing import Annotated

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among, known_policies
from moeroute.options import complete_traces

from moesim import __version__
from moesim.commands.options import Tokens

TRACE = "mixtral-like"
PAPER = "arXiv 2312.17238, Table 2"
OURS = ("lru", "lru-spec:n=1", "lru-spec")


def table2(
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Policies that this project's engine runs on the same cards. Default: "
            f"{' '.join(OURS)}.",
            show_default=False,
            autocompletion=among(known_policies),
        ),
    ] = None,
    *,
    trace: Annotated[
        str,
        typer.Option(
            help="A trace of Mixtral-8x7B with next-gate predictions.",
            autocompletion=complete_traces,
        ),
    ] = TRACE,
    tokens: Tokens = None,
    reading: Annotated[
        str,
        typer.Option(
            help="How the measured engines are understood. All readings are fitted and listed."
        ),
    ] = "released",
    output: OutputOptions,
) -> None:
    """Reproduce the base paper's Table 2.

    Two constants a card are fitted on the 2-bit cells; the 3-bit cells are predicted. The command
    prints every cell as published and as simulated, the constants next to the data sheets', what
    stays unexplained, and what this project's engine would reach on the same cards.
    """
    from moepolicy import find_policy
    from moeroute import open_trace

    from moesim.simulation import workload_for
    from moesim.table2.render import as_json, cells, text
    from moesim.table2.reproduce import find_reading, reproduce

    destination = output.checked()
    find_reading(reading)
    specs = [find_policy(name) for name in policies or OURS]
    opened = open_trace(trace)
    workload = workload_for(opened, [find_policy("lru-spec"), *specs])
    if tokens is not None:
        workload = workload.head(tokens)
    found = reproduce(workload, specs, reading=reading)
    title = f"{PAPER}, on {opened.title}, {workload.n_decoded:,} decoded tokens."
    provenance = {
        "kind": "simulated",
        "table": PAPER,
        "trace_sha256": opened.digest,
        "trace_seed": opened.meta.seed,
        "tokens": workload.n_decoded,
        "moesim_version": __version__,
    }
    destination.deliver(
        cells(found, provenance),
        lambda: text(found, workload, title),
        provenance | as_json(found, workload),
    )
