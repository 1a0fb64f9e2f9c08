"""The options that commands share, each one field: its type, help, old spellings and default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from moepolicy.completion import among
from moepolicy.options import formerly
from moepolicy.tables import Format

from moerun.commands import names

Output = Annotated[
    Format,
    typer.Option(
        help="How to print results: table for people, json or csv for programs. --out holds no "
        "such results, but what is measured, to go on with."
    ),
]
Machine = Annotated[
    str | None,
    typer.Option(
        help="The machine that moesim simulates: a name (see 'moesim machines') or a profile "
        "(TOML) that 'moerun profile' wrote.",
        show_default=False,
        autocompletion=among(names.machines),
    ),
]

Reuse = Annotated[
    str | None,
    typer.Option(
        help="How a text goes on from what is kept of another. exact: with the bits of a run from "
        "the start; prompts are read in chunks, and answers again. near: from the first token that "
        "differs; the last digits of logits may be others. Default: exact where the model computes "
        "in float32, else near.",
        show_default=False,
        autocompletion=among(names.reuses),
    ),
]

OnPolicyError = Annotated[
    str,
    typer.Option(
        help="When the policy fails. fallback: tell on stderr, go on under LRU, and exit with 1 at "
        "the end. stop: end at once.",
        rich_help_panel="Cache",
        autocompletion=among(names.answers_to_errors),
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights, in which precisions, and where they are packed."""

    panel: ClassVar[str] = "Model"

    model: Annotated[
        str,
        typer.Option(
            help="The model: tiny (bundled), a checkpoint's folder, a GGUF file, owner/name on the "
            "Hugging Face hub, or the folder of a store that 'moerun pack' made.",
            autocompletion=among(names.models),
        ),
    ] = "tiny"
    precision: Annotated[
        str,
        typer.Option(
            help="Precision of the experts: native (as they are published), fp32, fp16, bf16, "
            "4bit, 3bit or 2bit (HQQ), q4_0 or q8_0 (llama.cpp's blocks, on a CPU).",
            autocompletion=among(names.precisions),
        ),
    ] = "native"
    attention: Annotated[
        str,
        typer.Option(
            help="Precision of attention's projections, as --precision. Unquantised projections "
            "have the precision of the other dense weights.",
            autocompletion=among(names.precisions),
        ),
    ] = "native"
    store: Annotated[
        Path | None,
        typer.Option(
            help="The folder that holds the packed experts, or is to hold them. Default: a folder "
            "in the user's cache.",
            show_default=False,
        ),
    ] = None
    low: Annotated[
        str | None,
        typer.Option(
            help="A second precision of the experts, for policies that load some misses at a "
            "lower one: fp16, bf16, 4bit, 3bit or 2bit, packed like --precision, or the folder of "
            "a store.",
            show_default=False,
            autocompletion=among(names.lower_precisions),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Which experts are kept, in how much memory."""

    panel: ClassVar[str] = "Cache"

    policy: Annotated[
        str,
        typer.Option(
            help="The policy that chooses experts to keep and to fetch: a name (see 'moerun "
            "policies'), name:parameter=value,..., or path/to/file.py:Class.",
            autocompletion=among(names.policies),
        ),
    ] = "lru"
    slots: Annotated[
        int | None,
        typer.Option(
            help="Experts cached per layer. A global cache holds as many times the layers. "
            "Default: half of a layer's experts.",
            show_default=False,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --slots: all the memory that the run may take of the device, such as "
            "9GiB or 500MB. auto takes most of what is free.",
            show_default=False,
        ),
    ] = None
    memory_file: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --memory: a file that holds the amount. The run follows changes of "
            "the file while it generates.",
            show_default=False,
        ),
    ] = None
    context_tokens: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens of prompt and answer that --memory has room for. Default: what the prompt "
            "and --max-new-tokens need; where no prompt is known, 2048 or the model's limit.",
            show_default=False,
        ),
    ] = None
    prompt_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Read prompts so many tokens at a time. A long prompt takes less memory, which "
            "--memory then gives to experts, and more time: experts are loaded anew for each "
            "chunk. Default: a prompt is read in one pass.",
            show_default=False,
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Host memory for experts between disk and device, such as 16GiB. Experts that are "
            "not in it are read from disk. Default on a GPU: room for all experts; on the CPU: "
            "none, and experts go from disk to their slots.",
            show_default=False,
        ),
    ] = None
    scope: Annotated[
        str,
        typer.Option(
            help="One cache a layer, or one for all layers: layer, global.",
            autocompletion=among(names.scopes),
        ),
    ] = "layer"
    horizon: Annotated[
        int | None,
        typer.Option(
            help="How many layers ahead gates are applied. Default: 1 where the policy reads "
            "predictions or the run is recorded, else 0.",
            show_default=False,
        ),
    ] = None
    learned: Annotated[
        Path | None,
        typer.Option(
            help="A file that keeps what the policy learns: a run begins with what the last one "
            "has left there. For policies that learn, such as foresight.",
            show_default=False,
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The trace, or file of counts (SGLang, EPLB), that tells policies how often each "
            "expert is used. Default: the sample "
            "'tiny' where it is of this model's shape.",
            show_default=False,
            autocompletion=among(names.samples),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What computes, and how experts come to it."""

    panel: ClassVar[str] = "Device and link"

    device: Annotated[
        str,
        typer.Option(
            help="The device that computes: cpu, cuda, cuda:N, or auto (a GPU where there is one).",
            autocompletion=among(names.devices),
        ),
    ] = "auto"
    streams: Annotated[int, typer.Option(help="Copies under way at once: 1 to 3.")] = 1
    chunk: Annotated[
        str | None,
        typer.Option(
            help="Copy experts in pieces of this size, such as 4MiB: a wanted expert overtakes a "
            "prefetch between two pieces. Default: experts are copied whole.",
            show_default=False,
        ),
    ] = None
    link_gbps: Annotated[
        float | None,
        typer.Option(
            help="Cap the link at this many GB/s (10^9 bytes). A machine without a GPU then "
            "behaves like one behind a slower bus.",
            show_default=False,
        ),
    ] = None
    direct: Annotated[
        bool,
        typer.Option(
            "--direct",
            help="Read experts past the system's file cache, as if memory were too small for the "
            "model.",
        ),
        formerly("--cold"),
    ] = False
    machine: Annotated[
        str | None,
        typer.Option(
            help="A profile (TOML) of this machine that 'moerun profile' wrote, or a machine's "
            "name (see 'moesim machines'): for policies that ask how fast the machine is.",
            show_default=False,
            autocompletion=among(names.machines),
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads that compute on the CPU. Default: one fewer than there are cores; the "
            "last core is the link's.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, and when a text ends."""

    panel: ClassVar[str] = "Sampling"

    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 100
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; values above 0 sample.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End the text before this string, which may hold special tokens. May be given "
            "several times.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling. The same seed gives the same text.")
    ] = 0
