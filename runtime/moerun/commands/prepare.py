"""What becomes of the values of shared options: settings, sampling, stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from moepolicy import find_policy
from moepolicy.console import nearest

from moerun.commands import names
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, SamplingOptions
from moerun.errors import RunError, UsageError

if TYPE_CHECKING:
    from moerun.live.sampling import Sampling
    from moerun.settings import Settings
    from moerun.store.expert_store import ExpertStore


def settings(
    cache: CacheOptions,
    device: DeviceOptions,
    *,
    policy: str | None = None,
    recording: bool = False,
) -> Settings:
    """What the options say; ``policy`` stands in the place of the cache's own.

    Raises RunError, PolicyError or wrong usage where the options make no sense.
    """
    spec = find_policy(policy or cache.policy)
    _check_budget(cache)
    from moerun.devices import use_threads
    from moerun.live.options import read_settings

    use_threads(device.threads)
    return read_settings(
        policy=spec,
        device=device.device,
        streams=device.streams,
        link_gbps=device.link_gbps,
        slots=cache.slots,
        memory=cache.memory,
        memory_file=cache.memory_file,
        host_memory=cache.host_memory,
        chunk=device.chunk,
        context=cache.context_tokens,
        scope=cache.scope,
        cold=device.direct,
        horizon=1 if cache.horizon is None and recording else cache.horizon,
        calibration=cache.calibration,
    )


def _check_budget(cache: CacheOptions) -> None:
    """Wrong usage, by the options' own names, where they exclude each other."""
    given = {
        "--slots": cache.slots,
        "--memory": cache.memory,
        "--memory-file": cache.memory_file,
    }
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"give {' or '.join(chosen)}, not both")
    if cache.context_tokens is not None and chosen in ([], ["--slots"]):
        raise typer.BadParameter("--context is what --memory plans for: give that, too")


def sampling(options: SamplingOptions) -> Sampling:
    """How tokens are chosen. Raises UsageError for values that no run could have."""
    from moerun.live.sampling import Sampling

    chosen = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        stop_strings=tuple(options.stop or ()),
    )
    chosen.check()
    return chosen


def opened(model: ModelOptions, settings: Settings) -> tuple[ExpertStore, Settings]:
    """The store that the options name, and the settings with the store of --low, if there is one.

    Stores that are not there yet are made.
    """
    found = store(model)
    return found, replace(settings, low=low_store(model, found))


def store(model: ModelOptions) -> ExpertStore:
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
            model.model,
            precision=model.precision,
            attention=model.attention,
            folder=model.store,
            report=report,
            progress=progress,
        )


def low_store(model: ModelOptions, full: ExpertStore | None) -> ExpertStore | None:
    """The second store that --low asks for, lower than ``full``; None where it does not."""
    if model.low is None:
        return None
    from moerun.live.assembly import check_lower

    found = _low_store(model.model, model.low)
    if full is not None:
        check_lower(full, found)
    return found


def _low_store(model: str, low: str) -> ExpertStore:
    from moerun.format.precision import PRECISIONS
    from moerun.store.find import is_store

    if low not in PRECISIONS:
        if not is_store(Path(low).expanduser()):
            raise UsageError(
                f"--low {low} is neither a precision ({', '.join(PRECISIONS)}) nor a store's folder"
            )
        return store(ModelOptions(model=low))
    if is_store(Path(model).expanduser()):
        raise RunError(
            f"{model} is a packed store, which cannot be packed again at {low}: give --low the "
            "folder of a store packed from the same checkpoint"
        )
    return store(ModelOptions(model=model, precision=low))


def check_low_name(low: str | None, experts: Sequence[str]) -> None:
    """UsageError where --low names a precision that is no lower than one of ``experts``."""
    from moerun.format.precision import SCHEMES

    order = list(SCHEMES)  # most bits first
    for precision in experts:
        if low in order and precision in order and order.index(low) <= order.index(precision):
            raise UsageError(f"--low {low} is no lower than the experts' {precision}")


def check_machine(machine: str | None) -> None:
    """RunError where --machine names a profile that is not there, UsageError for an unknown name.

    A machine is meant by its name before a file of that name, as in moesim.
    """
    if machine is None or machine in names.machines() or Path(machine).is_file():
        return
    if Path(machine).suffix == ".toml" or Path(machine).parent != Path():
        raise RunError(f"{machine} is not there: give --machine a file from 'moerun profile'")
    raise UsageError(
        f"unknown machine '{machine}'; {nearest(machine, names.machines())}; or a profile of your "
        "own as path/to/machine.toml"
    )


def quiet_libraries() -> None:
    """Keep the libraries' own progress and advice off the screen."""
    import transformers

    utilities: Any = transformers.utils.logging
    utilities.set_verbosity_error()
    utilities.disable_progress_bar()
