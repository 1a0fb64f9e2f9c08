"""`moerun profile`: measure this machine for the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from moepolicy.outputs import check_free, check_suffix, written_whole
from rich.console import Console

from moerun.commands import options as opt


def profile(
    out: Annotated[Path, typer.Option(help="The TOML file to write.")],
    model: opt.Model = "tiny",
    precision: opt.Precision = "native",
    attention: opt.Attention = "native",
    store: opt.Store = None,
    slots: opt.Slots = None,
    device: opt.Device = "auto",
    streams: opt.Streams = 1,
    link_gbps: opt.LinkGbps = None,
    cold: opt.Cold = False,
    threads: opt.Threads = None,
    repeats: Annotated[
        int, typer.Option(help="How often to measure; the profile holds the medians.")
    ] = 5,
    name: Annotated[
        str | None,
        typer.Option(help="Of the profile. Default: the file's name.", show_default=False),
    ] = None,
    force: opt.Force = False,
) -> None:
    """Measure this machine with this model, for moesim.

    Writes a machine profile: link rate and latency, and what tokens, layers and experts cost, also
    experts computed on the CPU where they are kept. Run it while nothing else keeps the machine
    busy.
    """
    check_suffix(out, [".toml"])
    check_free(out, force=force)
    settings = opt.settings(
        policy="lru",
        slots=slots,
        device=device,
        streams=streams,
        link_gbps=link_gbps,
        cold=cold,
        threads=threads,
    )
    found = opt.store(model, precision, store, attention)
    from moerun.profiling.profiler import measure

    with Console(stderr=True).status("preparing") as status:
        measured = measure(found, settings, name or out.stem, repeats=repeats, report=status.update)
    with written_whole(out) as partial:
        partial.write_text(measured.to_toml(), encoding="utf-8")
    link, cost = measured.link, measured.compute
    typer.echo(
        f"{out}: link {link.bytes_per_s / 1e9:.3f} GB/s + {1e6 * link.latency_s:.0f} us a copy; "
        f"layer {1e6 * cost.layer_s:.0f} us, expert {1e6 * cost.expert_s:.0f} us, "
        f"token {1e6 * cost.token_s:.0f} us, waking up {1e6 * cost.arrival_s:.0f} us"
    )
    if measured.note:
        typer.echo(f"warning: {measured.note}", err=True)
