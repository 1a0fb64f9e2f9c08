"""What becomes of the values of shared options: settings, sampling, stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from moepolicy.console import nearest, note, say
from moepolicy.outputs import check_free, check_suffix
from moepolicy.progress import Bar

from moerun import ranges
from moerun.commands import names
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, SamplingOptions
from moerun.errors import RunError, UsageError
from moerun.format.names import PRECISIONS, QUANTISED, Precisions
from moerun.simulation import check_profile

if TYPE_CHECKING:
    from moepolicy import PolicySpec

    from moerun.live.sampling import Sampling
    from moerun.settings import Settings
    from moerun.store.expert_store import ExpertStore


def check(
    *,
    model: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    device: DeviceOptions | None = None,
    sampling: SamplingOptions | None = None,
    on_policy_error: str = "stop",
    reuse: str | None = None,
    planned: bool = False,
) -> None:
    """Refuse what no run could have, before torch is imported, which takes seconds.

    Raises RunError, PolicyError or wrong usage for options out of range, an unknown policy or
    precision, and a model or profile that is not there. ``planned``: the model may be the name of a
    shape.
    """
    from moepolicy import find_policy

    ranges.check_on_policy_error(on_policy_error)
    ranges.check_reuse(reuse)
    if sampling is not None:
        stops = tuple(sampling.stop or ())
        ranges.check_sampling(
            sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed, stops
        )
    if cache is not None:
        find_policy(cache.policy)
        _check_budget(cache)
        _check_files(cache)
        ranges.check_cache(
            slots=cache.slots,
            memory=cache.memory,
            host_memory=cache.host_memory,
            context=cache.context_tokens,
            prompt_chunk=cache.prompt_chunk,
            scope=cache.scope,
            horizon=cache.horizon,
            budgeted=cache.memory is not None or cache.memory_file is not None,
        )
    if cache is not None and cache.learned is not None:
        check_free(cache.learned, force=True, what="--learned")
    if device is not None:
        ranges.check_device(device.device)
        ranges.check_link(device.streams, device.chunk, device.link_gbps)
        if device.threads is not None:
            ranges.check_threads(device.threads)
        check_machine(device.machine)
    if model is not None:
        check_model(model, planned=planned)


def check_model(model: ModelOptions, *, planned: bool = False) -> None:
    """RunError where a model is not there, UsageError for names and precisions that are none."""
    Precisions.chosen(model.precision, model.attention, None)
    if not (planned and model.model in names.shapes()):
        _check_there(model.model, planned=planned)
    named = model.low is None or model.low in PRECISIONS
    if not named and not Path(model.low or "").expanduser().is_dir():
        raise UsageError(
            f"--low {model.low} is neither a precision ({', '.join(PRECISIONS)}) nor a store's "
            "folder"
        )


def check_recording(trace: Path | None, journal: Path | None, *, force: bool) -> None:
    """Refuse files that a recording could not be written to. Raises RunError or wrong usage."""
    for path, suffix, what in ((trace, ".parquet", "--record"), (journal, ".json", "--journal")):
        if path is not None:
            check_suffix(path, [suffix], what)
            check_free(path, force=force, what=what)


def is_packed(model: str) -> bool:
    """Whether a model is the folder of a store."""
    return (Path(model).expanduser() / "index.json").is_file()


def _check_there(name: str, *, planned: bool) -> None:
    from moerun.checkpoint.local import check_there

    try:
        check_there(name)
    except RunError as error:
        if not planned or "/" in name or name.startswith((".", "~")) or name.endswith(".gguf"):
            raise
        raise UsageError(
            f"there is no model {name!r} to plan for; "
            f"{nearest(name, names.shapes(), 'moerun families')}; or give a local folder, a GGUF "
            "file, or owner/name on the Hugging Face hub"
        ) from error


def _check_files(cache: CacheOptions) -> None:
    """RunError for a file of a budget that is not there, TraceError for a calibration's."""
    from moeroute.trace import find_existing

    if cache.calibration is not None:
        find_existing(cache.calibration)
    file = cache.memory_file
    if file is not None and not file.is_file():
        raise RunError(f"{file} is not there: write a memory budget into it, as 9GiB")


def settings(
    cache: CacheOptions,
    device: DeviceOptions,
    *,
    policies: Sequence[PolicySpec] = (),
    machine: str | None = None,
    on_policy_error: str = "stop",
    recording: bool = False,
    planned: bool = False,
) -> Settings:
    """What the options say; the first of ``policies`` stands in the place of the cache's own, and
    ``machine`` in that of the device's. A note on stderr says which of them run without a constant
    that they welcome. ``planned``: the device need not be here.

    Raises RunError, PolicyError or wrong usage where the options make no sense.
    """
    from moepolicy import find_policy

    from moerun.policies import missed_constants

    asked = list(policies) or [find_policy(cache.policy)]
    _check_budget(cache)
    machine = machine or device.machine
    check_machine(machine)
    for spec in asked:
        if (lacks := missed_constants(spec, machine=machine is not None)) is not None:
            say(f"note: {lacks}")
    with Bar("loading PyTorch and transformers"):
        from moerun.devices import use_threads
        from moerun.live.options import read_settings

    use_threads(device.threads)
    return read_settings(
        policy=asked[0],
        on_policy_error=on_policy_error,
        device=device.device,
        streams=device.streams,
        link_gbps=device.link_gbps,
        slots=cache.slots,
        memory=cache.memory,
        memory_file=cache.memory_file,
        host_memory=cache.host_memory,
        chunk=device.chunk,
        context=cache.context_tokens,
        prompt_chunk=cache.prompt_chunk,
        scope=cache.scope,
        cold=device.direct,
        horizon=1 if cache.horizon is None and recording else cache.horizon,
        calibration=cache.calibration,
        learned=cache.learned,
        machine=machine,
        planned=planned,
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


def reusing(settings: Settings, found: ExpertStore, reuse: str | None) -> Settings:
    """The settings, with how a text goes on from what is kept of another."""
    import torch

    exact = found.dense_dtype() is torch.float32 if reuse is None else reuse == "exact"
    return replace(settings, exact_reuse=exact)


def opened(model: ModelOptions, settings: Settings) -> tuple[ExpertStore, Settings]:
    """The store that the options name, and the settings with the store of --low, if there is one.

    Stores that are not there yet are made.
    """
    found = store(model)
    return found, replace(settings, low=low_store(model, found))


def store(model: ModelOptions) -> ExpertStore:
    """Find or make the store, telling on stderr when it must be made."""
    from moerun.store.find import find_store

    with _packing() as telling:
        return find_store(
            model.model,
            precision=model.precision,
            attention=model.attention,
            folder=model.store,
            **telling,
        )


def low_store(model: ModelOptions, full: ExpertStore | None) -> ExpertStore | None:
    """The second store that --low asks for, lower than ``full``; None where it does not."""
    if model.low is None:
        return None
    from moerun.live.assembly import check_lower
    from moerun.store.find import find_lower_store

    with _packing() as telling:
        found = find_lower_store(model.model, model.low, **telling)
    if full is not None:
        check_lower(full, found)
    return found


@contextmanager
def _packing() -> Iterator[dict[str, Any]]:
    """Yields ``report`` and ``progress`` of a store that may have to be packed: both on stderr."""
    from moerun.commands.progress import pack_progress

    quiet_libraries()
    with pack_progress() as progress:
        yield {"report": note, "progress": progress}


def check_low_name(low: str | None, experts: Sequence[str]) -> None:
    """UsageError where --low names a precision that is no lower than one of ``experts``."""
    order = QUANTISED  # most bits first
    for precision in experts:
        if low in order and precision in order and order.index(low) <= order.index(precision):
            raise UsageError(f"--low {low} is no lower than the experts' {precision}")


def check_machine(machine: str | None) -> None:
    """RunError where --machine names a profile that is not there, UsageError for an unknown name.

    A machine is meant by its name before a file of that name, as in moesim.
    """
    if machine is None or machine in names.machines():
        return
    if Path(machine).is_file():
        check_profile(Path(machine))
        return
    if Path(machine).suffix == ".toml" or Path(machine).parent != Path():
        raise RunError(f"{machine} is not there: give --machine a file from 'moerun profile'")
    raise UsageError(
        f"unknown machine '{machine}'; {nearest(machine, names.machines(), 'moesim machines')}; or "
        "a profile of your own as path/to/machine.toml"
    )


def quiet_libraries() -> None:
    """Keep the libraries' own progress and advice off the screen."""
    import transformers

    utilities: Any = transformers.utils.logging
    utilities.set_verbosity_error()
    utilities.disable_progress_bar()
