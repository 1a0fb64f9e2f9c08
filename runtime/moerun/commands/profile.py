"""`moerun profile`: measure this machine for the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from moepolicy.apps import Force
from moepolicy.options import formerly, taking
from moepolicy.outputs import check_free, check_suffix, written_whole
from moepolicy.tables import wrapped

from moerun.commands import prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions
from moerun.commands.progress import steps_progress, warn_where_busy
from moerun.ranges import check_rounds


def profile(
    out: Annotated[Path, typer.Option(help="The TOML file to write.")],
    *,
    rounds: Annotated[
        int,
        typer.Option(help="How often everything is measured. The profile holds the medians."),
        formerly("--repeats"),
    ] = 5,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the profile. Default: the file's name.", show_default=False),
    ] = None,
    force: Force = False,
    model: Annotated[ModelOptions, taking("model", "precision", "attention", "store")],
    cache: Annotated[CacheOptions, taking("slots")],
    device: Annotated[DeviceOptions, taking("device", "streams", "link_gbps", "direct", "threads")],
) -> None:
    """Measure this machine with this model, for moesim.

    The profile has the link's rate and latency and what tokens, layers and experts cost, on the
    device and on the CPU. Measure while nothing else keeps the machine busy.
    """
    check_suffix(out, [".toml"])
    check_free(out, force=force)
    prepare.check(model=model, cache=cache, device=device)
    check_rounds(rounds)
    settings = prepare.settings(cache, device)
    found = prepare.store(model)
    from moerun.profiling.profiler import measure

    warn_where_busy()
    with steps_progress(rounds) as begin:
        measured = measure(found, settings, name or out.stem, repeats=rounds, report=begin)
    with written_whole(out) as partial:
        partial.write_text(measured.to_toml(), encoding="utf-8")
    link, cost = measured.link, measured.compute
    told = (
        f"{out}: link {link.bytes_per_s / 1e9:.3f} GB/s + {1e6 * link.latency_s:.0f} us a copy; "
        f"layer {1e6 * cost.layer_s:.0f} us, expert {1e6 * cost.expert_s:.0f} us, "
        f"token {1e6 * cost.token_s:.0f} us, waking up {1e6 * cost.arrival_s:.0f} us"
    )
    typer.echo(wrapped([told]), nl=False)
    if measured.note:
        typer.echo(f"warning: {measured.note}", err=True)
