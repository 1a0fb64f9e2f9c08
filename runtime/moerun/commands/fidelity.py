"""`moerun fidelity`: live runs against the simulator's predictions."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import find_policy
from moepolicy.completion import among
from moepolicy.console import emit
from moepolicy.options import formerly, taking
from moepolicy.tables import Format, Table, to_csv, to_json, wrapped
from rich.console import Console

from moerun.commands import names, prepare
from moerun.commands.options import (
    CacheOptions,
    DeviceOptions,
    Machine,
    ModelOptions,
    Output,
    SamplingOptions,
)
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
            metavar="POLICY",
            help="The policies to compare. Default: lru, lfu and lru-spec.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None,
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = PROMPT,
    rounds: Annotated[
        int,
        typer.Option(help="Live runs of each policy, in turns."),
        formerly("--repeats"),
    ] = 5,
    machine: Machine = None,
    format: Output = Format.table,
    model: ModelOptions,
    cache: Annotated[CacheOptions, taking("slots", "scope", "calibration")],
    device: Annotated[DeviceOptions, taking("device", "streams", "link_gbps", "direct", "threads")],
    sampling: Annotated[SamplingOptions, taking("max_new_tokens", max_new_tokens=200)],
) -> None:
    """Compare what the simulator predicts with what this machine does.

    Each policy generates the same text live from a cold cache; the recorded trace is then
    simulated on --machine, by default with a profile measured now. The simulator (moesim) must be
    installed. Measure while nothing else keeps the machine busy.
    """
    refused: Refusals = {}
    asked = [find_policy(name) for name in policies or ("lru", "lfu", "lru-spec")]
    specs = servable(asked, refused, low=model.low is not None)
    settings = prepare.settings(cache, device, policy=specs[0].label)
    chosen = prepare.sampling(sampling)
    prepare.check_machine(machine)
    found, settings = prepare.opened(model, settings)
    from moerun.profiling.fidelity import compare

    with Console(stderr=True).status("preparing") as status:
        rows = compare(
            found,
            specs,
            settings,
            prompt,
            chosen,
            repeats=rounds,
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
            f"unreliable: other programs kept these runs waiting for {100 * waited:.0f} % of their "
            "time"
        )
    notes += refusal_notes(refused)
    title = wrapped(["live (measured) beside simulated (predicted)"])
    return f"{title}\n{table.render()}{wrapped(notes)}"
