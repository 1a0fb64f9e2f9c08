"""`moerun bench`: what policies would do on this machine, without a model's weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among
from moepolicy.console import nearest, note
from moepolicy.options import taking
from moepolicy.outputs import Output
from moepolicy.refusals import Refusals

from moerun.commands import names, prepare
from moerun.commands.options import CacheOptions, DeviceOptions, Machine, ModelOptions
from moerun.commands.progress import pack_progress, steps_progress, warn, warn_where_busy
from moerun.errors import RunError, UsageError
from moerun.format.names import Precisions
from moerun.ranges import check_counts

if TYPE_CHECKING:
    from moepolicy import PolicySpec

    from moerun.bench.run import Bench
    from moerun.bench.shapes import Shape
    from moerun.settings import Settings


class Baseline(StrEnum):
    """Engines that `moerun bench --baseline` knows by name."""

    released = "released"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is decoded under which policies, and how often."""

    shape: Annotated[
        str,
        typer.Option(
            help="A model's dimensions: a name of 'moerun families', or tiny (bundled); the path "
            "of a config.json or a GGUF file; or owner/name on the Hugging Face hub, of which "
            "config.json alone is fetched.",
            autocompletion=among(names.shapes),
        ),
    ] = "mixtral-8x7b"
    low: Annotated[
        str | None,
        typer.Option(
            help="A second precision of the experts, for policies that load some misses at a "
            "lower one.",
            show_default=False,
            autocompletion=among(names.lower_precisions),
        ),
    ] = None
    routing: Annotated[
        str | None,
        typer.Option(
            help="What the gates decide: a recorded trace (a file, or the sample mixtral-like or "
            "tiny), or 'uniform', drawn without any locality. Default: the sample whose layers, "
            "experts and experts a token are the shape's, else uniform.",
            show_default=False,
            autocompletion=among(names.routings),
        ),
    ] = None
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy to run; may be given several times. Default: lru and lru-spec.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None
    baseline: Annotated[
        Baseline | None,
        typer.Option(
            help="Run this in addition to the policies: 'released' is a model of the released "
            "mixtral-offloading engine (serial copies, evicted experts written back, no "
            "speculation).",
            show_default=False,
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(help="Keep only this many of the shape's layers.", show_default=False),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Have a token use so many experts, in place of the shape's: for routing that was "
            "recorded so.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[int, typer.Option(help="Measured tokens of each run.")] = 64
    warm_up: Annotated[
        int,
        typer.Option(
            help="Tokens that each run decodes before the measured ones, from an empty cache."
        ),
    ] = 16
    rounds: Annotated[int, typer.Option(help="Runs of each policy, in turns.")] = 3
    store: Annotated[
        Path | None,
        typer.Option(
            help="Keep the experts in files in this folder. Default: in memory.",
            show_default=False,
        ),
    ] = None
    machine: Machine = None
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0


def bench(
    *,
    options: BenchOptions,
    model: Annotated[ModelOptions, taking("precision", "attention", precision="2bit")],
    cache: Annotated[CacheOptions, taking("slots", "memory", "scope", "host_memory")],
    device: Annotated[
        DeviceOptions,
        taking("device", "streams", "chunk", "link_gbps", "direct", "threads"),
    ],
    output: OutputOptions,
) -> None:
    """Decode with random weights of a model's true size under recorded routing.

    No checkpoint is needed: the bench prints tokens/s of each policy on this machine, next to the
    bound that its link and its compute set, before anyone downloads 90 GB. With --machine it
    prints what moesim predicts, too.
    """
    from moepolicy import find_policy
    from moeroute.trace import find_existing

    from moerun.bench.shapes import find_shape
    from moerun.policies import servable

    to = output.checked()
    prepare.check(cache=cache, device=device)
    Precisions.chosen(model.precision, model.attention, None)
    check_counts(options.tokens, options.warm_up, options.rounds)
    if options.low is not None and options.low not in names.lower_precisions():
        raise UsageError(f"--low {options.low}: {nearest(options.low, names.lower_precisions())}")
    prepare.check_low_name(options.low, [model.precision])
    if options.routing not in (None, names.UNIFORM):
        find_existing(str(options.routing))
    prepare.check_machine(options.machine)
    refused: Refusals = {}
    asked = [find_policy(name) for name in options.policy or ("lru", "lru-spec")]
    specs = servable(
        asked, refused, low=options.low is not None, machine=options.machine is not None
    )
    for given, name in ((device.direct, "--direct"), (cache.host_memory, "--host-memory")):
        if given and options.store is None:
            raise typer.BadParameter(f"{name} is about experts in files: give --store")
    shape = find_shape(options.shape)
    shape.check_family()
    shape.check_layers(options.layers)
    shape.check_top_k(options.top_k)
    settings = prepare.settings(cache, device, policies=specs, machine=options.machine)
    with _made(options, shape, model, specs, settings, refused) as made:
        _run(made, options.machine, to)


def _made(
    options: BenchOptions,
    shape: Shape,
    model: ModelOptions,
    specs: tuple[PolicySpec, ...],
    settings: Settings,
    refused: Refusals,
) -> Bench:
    """The bench with its weights drawn; policies that the routing is too poor for join
    ``refused``."""
    prepare.quiet_libraries()
    from moerun.bench.generated import GeneratedModel
    from moerun.bench.models import find_config
    from moerun.bench.routing import choose_routing, load_routing
    from moerun.bench.run import Bench
    from moerun.bench.schedule import BenchSchedule

    released = options.baseline is Baseline.released
    schedule = BenchSchedule(specs, options.tokens, options.warm_up, options.rounds, released)
    schedule.check(low=options.low is not None, machine=options.machine is not None)
    generated = GeneratedModel(
        find_config(shape, options.layers, top_k=options.top_k),
        name=shape.name,
        precision=model.precision,
        seed=options.seed,
        attention=model.attention,
    )
    index = generated.index
    routing = options.routing
    if routing is None:
        routing, why = choose_routing(
            index.n_layers, index.n_experts, index.top_k, of_layers=shape.n_layers
        )
        note(why)
    forced = load_routing(
        routing,
        layers=index.n_layers,
        experts=index.n_experts,
        top_k=index.top_k,
        tokens=schedule.forced_tokens,
    )
    schedule = schedule.within(forced, refused)
    with pack_progress() as progress:
        made = Bench(
            generated,
            forced,
            settings,
            schedule,
            low=options.low,
            folder=options.store,
            report=note,
            progress=progress,
        )
    made.results.refused.update(refused)
    return made


def _run(made: Bench, machine: str | None, to: Output) -> None:
    """Run the bench and print its rows, with the simulator's figures where a machine is named."""
    from moerun.bench import report as reports
    from moerun.profiling.undisturbed import waited_note, waiting_s

    warn_where_busy()
    steps = made.schedule.n_steps + (machine is not None)
    with steps_progress(steps) as begin:
        began_s, before_s = time.perf_counter(), waiting_s()
        made.run(begin)
        waited = (waiting_s() - before_s) / (time.perf_counter() - began_s)
        simulated, failure = _simulate(made, machine, begin)
    if (said := waited_note(waited)) is not None:
        warn(said)
    rows = reports.rows_of(made, simulated)
    reports.deliver(to, rows, reports.provenance(made))
    if failure is not None:
        raise failure


def _simulate(
    made: Bench, machine: str | None, begin: Callable[[str], None]
) -> tuple[dict[str, float], RunError | None]:
    """What moesim predicts, and its failure: what was measured is worth having all the same."""
    from moerun.bench.simulated import simulated_tokens_per_s

    if machine is None:
        return {}, None
    begin("simulating")
    try:
        return simulated_tokens_per_s(made, machine), None
    except RunError as error:
        return {}, error
