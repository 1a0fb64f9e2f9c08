"""The options that commands share, and what becomes of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from moepolicy import find_policy
from moepolicy.tables import Format

from moerun.errors import RunError, UsageError

if TYPE_CHECKING:
    from moerun.live.sampling import Sampling
    from moerun.settings import Settings
    from moerun.store.expert_store import ExpertStore


Force = Annotated[
    bool, typer.Option("--force", help="Replace a file that lies where one is to be written.")
]
Output = Annotated[
    Format,
    typer.Option(help="table for people; json, csv for programs."),
]
Model = Annotated[
    str,
    typer.Option(
        help="tiny (bundled), a checkpoint's folder, owner/name on the Hugging Face hub, or the "
        "folder of a store made by 'moerun pack'."
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help="Which experts to keep and fetch: a name (see 'moerun policies'), "
        "name:parameter=value,..., or path/to/file.py:Class."
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        help="Experts cached per layer (a global cache holds as many times the layers). "
        "Default: half of a layer's experts.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Instead of --slots: all the memory the run may take of the device, as 9GiB or "
        "500MB; auto: most of what is free.",
        show_default=False,
    ),
]
MemoryFile = Annotated[
    Path | None,
    typer.Option(
        help="Instead of --memory: a file that holds it. Change the file, and the run follows "
        "while it generates.",
        show_default=False,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Host memory for experts between disk and device, as 16GiB: the others are read from "
        "disk when they are wanted. Default on a GPU: all of them are in host memory; on the CPU "
        "experts go from disk to their slots.",
        show_default=False,
    ),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens that --memory has room for, prompt and answer. Default: what the prompt and "
        "--max-new-tokens need; where no prompt is known, 2048 or the model's.",
        show_default=False,
    ),
]
Scope = Annotated[str, typer.Option(help="One cache a layer, or one for all: layer, global.")]
Precision = Annotated[
    str,
    typer.Option(
        help="Of the experts: native (as they are), fp32, fp16, bf16, 4bit, 3bit or 2bit (HQQ)."
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        help="Precision of attention's projections, as --precision; unquantised they are as the "
        "other dense weights."
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        help="Where the packed experts are, or are to be. Default: in the user's cache.",
        show_default=False,
    ),
]
Low = Annotated[
    str | None,
    typer.Option(
        help="For policies that load some misses at a lower precision: fp16, bf16, 4bit, 3bit or "
        "2bit, packed like --precision, or the folder of a store.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.")]
Streams = Annotated[int, typer.Option(help="Copies under way at once: 1 to 3.")]
Chunk = Annotated[
    str | None,
    typer.Option(
        help="Let experts travel in pieces of this size, as 4MiB: what is wanted overtakes a "
        "prefetch between two of them. Default: whole.",
        show_default=False,
    ),
]
LinkGbps = Annotated[
    float | None,
    typer.Option(
        help="Cap the link at so many GB/s (10^9 bytes): a machine without a GPU then behaves "
        "like one behind a slower bus.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads that compute on the CPU. Default: one less than there are cores, which is "
        "the link's.",
        show_default=False,
    ),
]
Cold = Annotated[
    bool,
    typer.Option(
        "--cold",
        help="Keep what is read out of the system's file cache, as if memory were too small for "
        "the model.",
    ),
]
Horizon = Annotated[
    int | None,
    typer.Option(
        help="How many layers ahead the gates are asked. Default: 1 where the policy looks at "
        "predictions or the run is recorded, else 0.",
        show_default=False,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="The trace in which policies that need it count experts. Default: the sample 'tiny' "
        "where it is of this model's shape.",
        show_default=False,
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End the text before this string, special tokens among what it is compared with; may "
        "be given several times.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.")]
Seed = Annotated[int, typer.Option(help="Of the sampling; the same seed gives the same text.")]


def settings(
    *,
    policy: str,
    device: str,
    streams: int,
    link_gbps: float | None,
    slots: int | None = None,
    memory: str | None = None,
    memory_file: Path | None = None,
    host_memory: str | None = None,
    chunk: str | None = None,
    context: int | None = None,
    scope: str = "layer",
    cold: bool = False,
    threads: int | None = None,
    horizon: int | None = None,
    calibration: str | None = None,
    recording: bool = False,
) -> Settings:
    """What the options say; RunError, PolicyError or wrong usage where they make no sense."""
    spec = find_policy(policy)
    given = {"--slots": slots, "--memory": memory, "--memory-file": memory_file}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"give {' or '.join(chosen)}, not both")
    if context is not None and context < 2:
        raise UsageError(f"context must be 2 or more tokens, not {context}")
    if context is not None and chosen in ([], ["--slots"]):
        raise typer.BadParameter("--context is what --memory plans for: give that, too")
    if horizon is not None and horizon < 0:
        raise UsageError(f"horizon must be 0 or more, not {horizon}")
    from moerun.amounts import parse_bytes
    from moerun.devices import find_device, use_threads
    from moerun.links.base import check_ways
    from moerun.live.assembly import check_rate
    from moerun.memory.budget import parse_budget, read_budget
    from moerun.policies import refuse_unservable
    from moerun.settings import Settings

    # Before a checkpoint is packed for hours in vain; a lower precision may still be given.
    refuse_unservable(spec, low=True)
    chunk_bytes = 0 if chunk is None else parse_bytes(chunk)
    check_ways(streams, chunk_bytes)
    if scope not in ("layer", "global"):
        raise UsageError(f"unknown scope '{scope}': it is 'layer' or 'global'")
    if link_gbps is not None:
        check_rate(link_gbps * 1e9)
    use_threads(threads)
    found = find_device(device)
    budget = None if memory is None else parse_budget(memory, found)
    if memory_file is not None:
        budget = read_budget(memory_file, found)
    return Settings(
        policy=spec,
        slots=slots,
        memory_bytes=budget,
        memory_file=memory_file,
        host_bytes=None if host_memory is None else parse_bytes(host_memory),
        chunk_bytes=chunk_bytes,
        context_tokens=context,
        scope=scope,
        device=found,
        streams=streams,
        link_bytes_per_s=None if link_gbps is None else link_gbps * 1e9,
        cold=cold,
        horizon=1 if horizon is None and recording else horizon,
        calibration=calibration,
    )


def sampling(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: list[str] | None = None,
) -> Sampling:
    from moerun.live.sampling import Sampling

    chosen = Sampling(max_new_tokens, temperature, top_p, seed, stop_strings=tuple(stop or ()))
    chosen.check()
    return chosen


def store(
    model: str, precision: str, folder: Path | None, attention: str = "native"
) -> ExpertStore:
    """Find or make the store, telling on stderr when it must be made."""
    from rich.console import Console

    from moerun.commands.progress import pack_progress
    from moerun.store.find import find_store

    quiet_libraries()
    console = Console(stderr=True)

    def report(text: str) -> None:
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    with pack_progress(console) as progress:
        return find_store(
            model,
            precision=precision,
            attention=attention,
            folder=folder,
            report=report,
            progress=progress,
        )


def check_machine(profile: Path | None) -> None:
    """RunError where a machine's profile was named that is not there."""
    if profile is not None and not profile.is_file():
        raise RunError(f"{profile} is not there: give --machine a file from 'moerun profile'")


def low_store(model: str, low: str | None, full: ExpertStore | None) -> ExpertStore | None:
    """The second store that --low asks for, lower than ``full``; None where it does not."""
    if low is None:
        return None
    from moerun.live.assembly import check_lower

    found = _low_store(model, low)
    if full is not None:
        check_lower(full, found)
    return found


def check_low_name(low: str | None, experts: Sequence[str]) -> None:
    """UsageError where --low names a precision that is no lower than one of ``experts``."""
    from moerun.format.precision import SCHEMES

    order = list(SCHEMES)  # most bits first
    for precision in experts:
        if low in order and precision in order and order.index(low) <= order.index(precision):
            raise UsageError(f"--low {low} is no lower than the experts' {precision}")


def _low_store(model: str, low: str) -> ExpertStore:
    from moerun.format.precision import PRECISIONS
    from moerun.store.find import is_store

    if low not in PRECISIONS:
        if not is_store(Path(low).expanduser()):
            raise UsageError(
                f"--low {low} is neither a precision ({', '.join(PRECISIONS)}) nor a store's folder"
            )
        return store(low, "native", None)
    if is_store(Path(model).expanduser()):
        raise RunError(
            f"{model} is a packed store, which cannot be packed again at {low}: give --low the "
            "folder of a store packed from the same checkpoint"
        )
    return store(model, low, None)


def quiet_libraries() -> None:
    """Keep the libraries' own progress and advice off the screen."""
    import transformers

    utilities: Any = transformers.utils.logging
    utilities.set_verbosity_error()
    utilities.disable_progress_bar()
