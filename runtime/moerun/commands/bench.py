"""`moerun bench`: what policies would do on this machine, without a model's weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from moepolicy import find_policy
from moepolicy.completion import among
from moepolicy.console import emit
from moepolicy.options import taking
from moepolicy.tables import Format
from rich.console import Console

from moerun.commands import names, prepare
from moerun.commands.options import CacheOptions, DeviceOptions, Machine, ModelOptions, Output
from moerun.commands.progress import pack_progress
from moerun.errors import RunError
from moerun.policies import Refusals, servable


class Baseline(StrEnum):
    """Engines that `moerun bench --baseline` knows by name."""

    released = "released"


def bench(
    *,
    shape: Annotated[
        str,
        typer.Option(
            help="A model's dimensions: mixtral-8x7b, mixtral-8x22b, qwen3-30b-a3b, gpt-oss-20b, "
            "gpt-oss-120b, deepseek-v2-lite, deepseek-v3, glm-4.5-air, olmoe-1b-7b, tiny "
            "(bundled), or the path of a config.json.",
            autocompletion=among(names.shapes),
        ),
    ] = "mixtral-8x7b",
    low: Annotated[
        str | None,
        typer.Option(
            help="A second precision of the experts, for policies that load some misses at a "
            "lower one.",
            show_default=False,
            autocompletion=among(names.lower_precisions),
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="What the gates decide: a recorded trace (a file, or the sample mixtral-like or "
            "tiny), or 'uniform', drawn without any locality.",
            autocompletion=among(names.routings),
        ),
    ] = "mixtral-like",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy to run; may be given several times. Default: lru and lru-spec.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(
            help="Run this in addition to the policies: 'released' is a model of the released "
            "mixtral-offloading engine (serial copies, evicted experts written back, no "
            "speculation).",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Keep only this many of the shape's layers.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Measured tokens of each run.")] = 64,
    warm_up: Annotated[
        int,
        typer.Option(
            help="Tokens that each run decodes before the measured ones, from an empty cache."
        ),
    ] = 16,
    rounds: Annotated[int, typer.Option(help="Runs of each policy, in turns.")] = 3,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Keep the experts in files in this folder. Default: in memory.",
            show_default=False,
        ),
    ] = None,
    machine: Machine = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    format: Output = Format.table,
    model: Annotated[ModelOptions, taking("precision", "attention", precision="2bit")],
    cache: Annotated[CacheOptions, taking("slots", "memory", "scope", "host_memory")],
    device: DeviceOptions,
) -> None:
    """Decode with random weights of a model's true size under recorded routing.

    No checkpoint is needed: the bench prints tokens/s of each policy on this machine, next to the
    bound that its link and its compute set, before anyone downloads 90 GB. With --machine it
    prints what moesim predicts, too.
    """
    refused: Refusals = {}
    asked = [find_policy(name) for name in policy or ("lru", "lru-spec")]
    specs = servable(asked, refused, low=low is not None)
    for given, name in ((device.direct, "--direct"), (cache.host_memory, "--host-memory")):
        if given and store is None:
            raise typer.BadParameter(f"{name} is about experts in files: give --store")
    settings = prepare.settings(cache, device, policy=specs[0].label)
    prepare.quiet_libraries()
    from moerun.bench import report as reports
    from moerun.bench.generated import GeneratedModel
    from moerun.bench.models import find_config, shape_name
    from moerun.bench.routing import load_routing
    from moerun.bench.run import Bench
    from moerun.bench.schedule import BenchSchedule
    from moerun.bench.simulated import simulated_tokens_per_s

    schedule = BenchSchedule(specs, tokens, warm_up, rounds, baseline is Baseline.released)
    schedule.check(low=low is not None)
    prepare.check_machine(machine)
    config = find_config(shape, layers)
    generated = GeneratedModel(
        config,
        name=shape_name(shape),
        precision=model.precision,
        seed=seed,
        attention=model.attention,
    )
    index = generated.index
    forced = load_routing(
        routing,
        layers=index.n_layers,
        experts=index.n_experts,
        top_k=index.top_k,
        tokens=schedule.forced_tokens,
    )
    schedule = schedule.within(forced, refused)
    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    with pack_progress(console) as progress:
        made = Bench(
            generated,
            forced,
            settings,
            schedule,
            low=low,
            folder=store,
            report=tell,
            progress=progress,
        )
        made.results.refused.update(refused)
    with made:
        with console.status("starting") as status:
            made.run(status.update)
        simulated: dict[str, float] = {}
        failure = None
        if machine is not None:
            tell("simulating")
            try:
                simulated = simulated_tokens_per_s(made, machine)
            except RunError as error:
                failure = error  # what was measured is worth having all the same
        rows = reports.rows_of(made, simulated)
        emit(reports.render(rows, format, reports.provenance(made)))
        if failure is not None:
            raise failure
