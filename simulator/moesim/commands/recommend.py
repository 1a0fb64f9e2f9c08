"""`moesim recommend`: with which policy and options to run a model on a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from moepolicy.apps import OutputOptions
from moepolicy.completion import among, known_policies
from moepolicy.console import say
from moepolicy.outputs import check_free, check_suffix, written_whole
from moepolicy.progress import Bar
from moeroute.options import complete_models, complete_precisions, complete_traces

from moesim.machine.profile import machine_names
from moesim.recommend import DISK, LEAST_BITS

N_STEPS = 6  # that the progress counts


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """The machine, and how much of its memory is to be used."""

    panel: ClassVar[str] = "Machine"

    machine: Annotated[
        str | None,
        typer.Option(
            help="The machine: a name (see 'moesim machines') or a profile (TOML), such as "
            "'moerun profile' writes. Default: this machine, as far as its driver tells.",
            show_default=False,
            autocompletion=among(machine_names),
        ),
    ] = None
    link_gbps: Annotated[
        float | None,
        typer.Option(
            help="GB/s that copies to the card reach (10^9 bytes), in place of the profile's.",
            show_default=False,
            min=0.001,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the device for all of the run, such as 9GiB. Default: nine tenths of "
            "the machine's.",
            show_default=False,
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Host memory for experts, such as 24GiB. Experts that are not in it are read from "
            "--disk. Default: room for all experts, or on this machine what is free.",
            show_default=False,
        ),
    ] = None
    disk: Annotated[
        str,
        typer.Option(
            help="The machine whose disk holds experts that host memory has no room for.",
            autocompletion=among(machine_names),
        ),
    ] = DISK


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """What is chosen already, and what may not be chosen."""

    panel: ClassVar[str] = "Choice"

    least_bits: Annotated[
        int,
        typer.Option(
            min=2, max=16, help="The fewest bits of a weight that experts and attention may have."
        ),
    ] = LEAST_BITS
    precision: Annotated[
        str | None,
        typer.Option(
            help="The experts' precision, which is then not chosen.",
            show_default=False,
            autocompletion=complete_precisions,
        ),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention's precision, which is then not chosen.",
            show_default=False,
            autocompletion=complete_precisions,
        ),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            help="The policy, which is then not chosen.",
            show_default=False,
            autocompletion=among(known_policies),
        ),
    ] = None


def recommend(
    model: Annotated[
        str,
        typer.Argument(
            help="The model: a name such as qwen3-30b-a3b, owner/name on the Hugging Face hub, a "
            "config.json, a checkpoint's folder, or a trace.",
            autocompletion=complete_models,
        ),
    ],
    *,
    trace: Annotated[
        str | None,
        typer.Option(
            help="A trace of the model, or of one of its shape. Default: generated routing.",
            show_default=False,
            autocompletion=complete_traces,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of prompt and answer to have memory for. Default: 4096, or all that the "
            "model can have where these are fewer.",
            show_default=False,
        ),
    ] = None,
    hardware: HardwareOptions,
    choice: ChoiceOptions,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Write the options to this TOML file, which 'moerun --config' reads.",
            show_default=False,
        ),
    ] = None,
    output: OutputOptions,
) -> None:
    """Choose policy, precision and options for a model, a machine and its memory.

    Options are decided one after the other by simulation, and the table says what each is worth.
    Only policies that change no token are chosen. Nothing is downloaded: the model's weights may
    be anywhere.
    """
    from moesim.recommend.ask import recommendation

    destination = output.checked()
    if config is not None:
        check_suffix(config, (".toml",), "--config")
        check_free(config, force=output.force, what="--config")
    with Bar("recommend", N_STEPS) as steps:
        found = recommendation(
            model,
            trace=trace,
            context=context,
            **asdict(hardware),
            **asdict(choice),
            tell=steps.begin,
        )
    if config is not None:
        with written_whole(config) as partial:
            partial.write_text(found.toml(), encoding="utf-8")
    destination.deliver(found.rows(), found.table, found.document())
    if config is not None:
        say(f'{config} has these options: moerun --config {config} --prompt "..."')
        packed = "" if found.wanted.run_as == "tiny" else " --model FOLDER, what you packed"
        say(f"is it right? on that machine: moerun fidelity --config {config}{packed}")
