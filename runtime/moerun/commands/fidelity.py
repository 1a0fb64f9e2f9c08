"""`moerun fidelity`: live runs against the simulator's predictions."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among
from moepolicy.console import note
from moepolicy.lossy import MARKED, marked
from moepolicy.options import formerly, taking
from moepolicy.refusals import Refusals, refusal_notes, with_refused
from moepolicy.tables import Table, wrapped

from moerun.commands import names, prepare
from moerun.commands.options import (
    CacheOptions,
    DeviceOptions,
    Machine,
    ModelOptions,
    SamplingOptions,
)
from moerun.commands.progress import steps_progress, warn_where_busy
from moerun.profiling.undisturbed import UNDISTURBED_WAIT
from moerun.ranges import check_rounds

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
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Begin no turn that would likely end later than this, after the first: a busy "
            "machine makes turns longer, and makes some again. Default: no limit.",
            show_default=False,
            min=1,
        ),
    ] = None,
    machine: Machine = None,
    model: ModelOptions,
    cache: Annotated[
        CacheOptions,
        taking("slots", "memory", "context_tokens", "host_memory", "scope", "calibration"),
    ],
    device: Annotated[DeviceOptions, taking("device", "streams", "link_gbps", "direct", "threads")],
    sampling: Annotated[SamplingOptions, taking("max_new_tokens", max_new_tokens=200)],
    output: OutputOptions,
) -> None:
    """Compare what the simulator predicts with what this machine does.

    Each policy generates the same text live from a cold cache; the recorded trace is then
    simulated on --machine, by default with a profile measured now. The simulator (moesim) must be
    installed. Measure while nothing else keeps the machine busy.
    """
    from moepolicy import find_policy

    from moerun.policies import servable

    destination = output.checked()
    check_rounds(rounds)
    prepare.check_machine(machine)
    prepare.check(model=model, cache=cache, device=device, sampling=sampling)
    refused: Refusals = {}
    asked = [find_policy(name) for name in policies or ("lru", "lfu", "lru-spec")]
    specs = servable(asked, refused, low=model.low is not None, machine=machine is not None)
    settings = prepare.settings(cache, device, policies=specs, machine=machine)
    chosen = prepare.sampling(sampling)
    found, settings = prepare.opened(model, settings)
    from moerun.profiling.fidelity import compare

    warn_where_busy()
    # A turn measures the machine, unless it is given, and runs each policy.
    steps = rounds * (len(specs) + (machine is None)) + 1
    with steps_progress(steps) as begin:
        rows = compare(
            found,
            specs,
            settings,
            prompt,
            chosen,
            repeats=rounds,
            machine=machine,
            report=begin,
            refused=refused,
            within_s=seconds,
        )
    made = max(len(row.live_runs) for row in rows)
    if seconds is not None and made < rounds:
        note(f"the {seconds:g} s were up after {made} of {rounds} turns")
    destination.deliver(_plain(rows, refused), lambda: _table(rows, refused))


def _plain(rows: list[Comparison], refused: Refusals) -> list[dict[str, Any]]:
    return with_refused([asdict(row) | {"error": row.error} for row in rows], refused)


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
            marked(row.policy, row.lossy),
            str(row.slots),
            f"{row.live_tokens_per_s:.2f}",
            f"{row.simulated_tokens_per_s:.2f}",
            f"{100 * row.error:+.1f} %",
            *(f"{100 * live:.1f} | {100 * simulated:.1f}" for live, simulated in pairs),
        )
    for name in refused:
        table.add_row(name, *[""] * (1 + len(names)))
    notes = ["hit, late, miss, useless: live | simulated, in % of the experts wanted"]
    notes += [MARKED] * any(row.lossy for row in rows)
    waited = rows[0].waited
    if waited > UNDISTURBED_WAIT:
        notes.append(
            f"unreliable: other programs kept these runs waiting for {100 * waited:.0f} % of their "
            "time"
        )
    notes += refusal_notes(refused)
    title = wrapped(["live (measured) next to simulated (predicted)"])
    return f"{title}\n{table.render()}{wrapped(notes)}"
