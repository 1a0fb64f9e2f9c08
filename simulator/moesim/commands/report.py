"""`moesim report`: what a trace says and what policies make of it, as one page of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import lists
from moepolicy.apps import Force
from moepolicy.completion import among, known_policies
from moepolicy.outputs import check_free, check_suffix, written_whole
from moepolicy.progress import Bar
from moepolicy.tables import to_csv, wrapped
from moeroute.options import SizeOptions, complete_traces

from moesim.commands.compare import ExpertSizeOptions
from moesim.commands.options import bytes_of, tell
from moesim.errors import UsageError
from moesim.machine.profile import DEFAULT_MACHINE, load_machine, machine_names
from moesim.pictures.drawing import require_plots, write_picture

if TYPE_CHECKING:
    from moepolicy import PolicySpec
    from moeroute import Trace

    from moesim.pictures.page import Page

DEFAULT_POLICIES = ("lru", "lfu", "lru-spec", "foresight-bypass", "belady", "clairvoyant")
DEFAULT_TOKENS = 4096


def report(
    trace: Annotated[
        str,
        typer.Argument(
            help="A trace file, or the name of a sample: tiny, mixtral-like.",
            autocompletion=complete_traces,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The page to write, report.html.")],
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for the pictures as SVG and PNG, and their numbers as CSV.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="The policies to show, separated by commas or blanks. Default: "
            f"{', '.join(DEFAULT_POLICIES)}, as far as the trace has what they need.",
            show_default=False,
            autocompletion=among(known_policies),
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="The machine to simulate: a name or a profile (TOML). Default: one on which "
            "policies differ.",
            show_default=False,
            autocompletion=among(machine_names),
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts cached per layer, where one size is shown. Default: one at which "
            "policies differ.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Replay only this many tokens of the trace.")
    ] = DEFAULT_TOKENS,
    seed: Annotated[int, typer.Option(help="Seed of the shuffled copy of the trace.", min=0)] = 0,
    experts: ExpertSizeOptions,
    sizes: SizeOptions,
    force: Force = False,
) -> None:
    """Write a page of pictures about a trace, which opens without a network.

    It shows: hit ratio by cache size, tokens/s by memory and by bandwidth with the limit, where
    the time goes, a few tokens in time, use of experts, locality, recall of predictions. All times
    are simulated. The page is light or dark as its reader prefers, and prints light.
    """
    from moesim.choice import choose
    from moesim.comparison import Setting, workload_of
    from moesim.engines.compilations import Compilations
    from moesim.overview.build import N_PARTS, live_first, make_page
    from moesim.overview.simulated import Study
    from moesim.sizes import spare_slots

    check_suffix(out, (".html",))
    check_free(out, force=force)
    if pictures is not None:
        check_free(pictures, force=False, what="--pictures", folder=True)
    require_plots()
    setting = Setting.of(
        trace,
        machine or DEFAULT_MACHINE,
        precision=experts.precision,
        expert_bytes=bytes_of(experts.expert_bytes, "--expert-bytes"),
        low_precision=experts.low,
        low_expert_bytes=bytes_of(experts.low_expert_bytes, "--low-expert-bytes"),
        given=sizes.given(),
        tokens=tokens,
    )
    asked = [] if slots is None else [slots]
    tell([*sizes.given().notes(setting.trace.meta), *spare_slots(asked, setting.meta)])
    specs = live_first(_specs(policies, setting.trace))
    workload = workload_of(setting, specs)
    chosen = choose(
        workload,
        setting.scope,
        setting.expert_bytes,
        machine=None if machine is None else load_machine(machine),
        slots=asked or None,
    )
    setting = setting.on(chosen.machine)
    with Bar("report", N_PARTS) as steps:
        study = Study(
            setting,
            specs,
            workload,
            chosen.slots[len(chosen.slots) // 2],
            Compilations(),
            iter,
        )
        page = make_page(study, seed, chosen.why, steps.begin)
        steps.begin("drawing")
        text = page.html()
        if pictures is not None:
            _write_pictures(pictures, page)
    with written_whole(out) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: {len(page.figures)} pictures, {len(text.encode()):,} bytes", err=True)
    typer.echo(wrapped([page.lead]), nl=False)


def _specs(names: str | None, trace: Trace) -> list[PolicySpec]:
    """The policies named, or those by default that the trace serves."""
    from moepolicy import find_policy

    if names is not None:
        found = [find_policy(name) for name in lists.policies(names)]
        if not found:
            raise UsageError("--policies is empty: name a policy or more")
        return found
    return [spec for spec in map(find_policy, DEFAULT_POLICIES) if _serves(trace, spec)]


def _serves(trace: Trace, spec: PolicySpec) -> bool:
    from moeroute import TraceError

    from moesim.simulation import check_needs

    try:
        check_needs(trace, spec)
    except TraceError:
        return False
    return True


def _write_pictures(folder: Path, page: Page) -> None:
    """Every figure as SVG and PNG, and its numbers."""
    folder.mkdir()
    for one in page.figures:
        for suffix in (".svg", ".png"):
            write_picture(folder / f"{one.name}{suffix}", one.chart, one.heading)
        (folder / f"{one.name}.csv").write_text(to_csv(one.rows), encoding="utf-8")
