"""`moerun fidelity`: live runs beside the simulator's predictions."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import find_policy
from moepolicy.console import emit
from moepolicy.tables import Format, Table, to_csv, to_json, wrapped
from rich.console import Console

from moerun.commands import options as opt
from moerun.policies import Refusals, refusal_notes, servable, with_refused
from moerun.profiling.undisturbed import CALM

if TYPE_CHECKING:
    from moerun.profiling.fidelity import Comparison

PROMPT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, and"
)


def fidelity(
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY...", help="Default: lru, lfu and lru-spec.", show_default=False
        ),
    ] = None,
    model: opt.Model = "tiny",
    slots: opt.Slots = None,
    scope: opt.Scope = "layer",
    precision: opt.Precision = "native",
    attention: opt.Attention = "native",
    store: opt.Store = None,
    low: opt.Low = None,
    device: opt.Device = "auto",
    streams: opt.Streams = 1,
    link_gbps: opt.LinkGbps = None,
    cold: opt.Cold = False,
    threads: opt.Threads = None,
    calibration: opt.Calibration = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = PROMPT,
    max_new_tokens: opt.MaxNewTokens = 200,
    repeats: Annotated[int, typer.Option(help="Live runs of each policy, in turns.")] = 5,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="A profile of this machine from 'moerun profile' with the same options. "
            "Default: measure one now.",
            show_default=False,
        ),
    ] = None,
    format: opt.Output = Format.table,
) -> None:
    """Compare what the simulator predicts with what this machine does.

    Each policy generates the same text live from a cold cache; the recorded trace is then
    simulated with a profile of this machine. Needs the simulator (moesim) installed. Run it while
    nothing else keeps the machine busy.
    """
    refused: Refusals = {}
    asked = [find_policy(name) for name in policies or ("lru", "lfu", "lru-spec")]
    specs = servable(asked, refused, low=low is not None)
    settings = opt.settings(
        policy=specs[0].label,
        slots=slots,
        scope=scope,
        device=device,
        streams=streams,
        link_gbps=link_gbps,
        cold=cold,
        threads=threads,
        calibration=calibration,
    )
    sampling = opt.sampling(max_new_tokens, 0.0, 1.0, 0)
    opt.check_machine(machine)
    found = opt.store(model, precision, store, attention)
    settings = replace(settings, low=opt.low_store(model, low, found))
    from moerun.profiling.fidelity import compare

    with Console(stderr=True).status("preparing") as status:
        rows = compare(
            found,
            specs,
            settings,
            prompt,
            sampling,
            repeats=repeats,
            machine=machine,
            report=status.update,
            refused=refused,
        )
    emit(_render(rows, format, refused))


def _render(rows: list[Comparison], format: Format, refused: Refusals) -> str:
    if format is Format.table:
        return _table(rows, refused)
    plain = with_refused([asdict(row) | {"error": row.error} for row in rows], refused)
    return to_json(plain) if format is Format.json else to_csv(plain)


def _table(rows: list[Comparison], refused: Refusals) -> str:
    names = ["live tok/s", "sim tok/s", "error", "hit %", "late %", "miss %", "useless %"]
    table = Table(["policy", "slots"], names, right=["slots"])
    for row in rows:
        pairs = (
            (row.live_hits, row.simulated_hits),
            (row.live_late, row.simulated_late),
            (row.live_misses, row.simulated_misses),
            (row.live_useless, row.simulated_useless),
        )
        table.add_row(
            row.policy,
            str(row.slots),
            f"{row.live_tokens_per_s:.2f}",
            f"{row.simulated_tokens_per_s:.2f}",
            f"{100 * row.error:+.1f} %",
            *(f"{100 * live:.1f} | {100 * simulated:.1f}" for live, simulated in pairs),
        )
    for name in refused:
        table.add_row(name, *[""] * (1 + len(names)))
    notes = ["hit, late, miss, useless: live | simulated, in % of the experts wanted"]
    waited = rows[0].waited
    if waited > CALM:
        notes.append(
            f"not to be relied on: other programs kept these runs waiting for {100 * waited:.0f} % "
            "of their time"
        )
    notes += refusal_notes(refused)
    title = wrapped(["live (measured) beside simulated (predicted)"])
    return f"{title}\n{table.render()}{wrapped(notes)}"
