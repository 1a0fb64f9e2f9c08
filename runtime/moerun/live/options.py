"""How a store is to be run, as users write it: read and checked for commands and programs alike."""

from __future__ import annotations

from pathlib import Path

import torch
from moepolicy import PolicySpec, find_policy

from moerun.devices import find_device
from moerun.errors import UsageError
from moerun.live.learned import begin_with
from moerun.memory.budget import parse_budget, read_budget
from moerun.policies import refuse_unservable
from moerun.ranges import check_cache, check_link, check_on_policy_error, read_bytes
from moerun.settings import Settings


def read_settings(
    *,
    policy: str | PolicySpec,
    device: str,
    streams: int,
    link_gbps: float | None,
    slots: int | None = None,
    memory: str | int | None = None,
    memory_file: Path | None = None,
    host_memory: str | int | None = None,
    chunk: str | int | None = None,
    context: int | None = None,
    prompt_chunk: int | None = None,
    scope: str = "layer",
    cold: bool = False,
    horizon: int | None = None,
    calibration: str | None = None,
    machine: str | None = None,
    learned: Path | None = None,
    on_policy_error: str = "stop",
    planned: bool = False,
) -> Settings:
    """The settings that these options ask for, with no store of a lower precision yet.

    Sizes are bytes or texts with a unit ("9GiB"); ``memory`` may be "auto", too; ``link_gbps`` is
    in 10^9 bytes/s; ``planned``: memory is planned and nothing is run, so the device need not be
    here. To be called before a checkpoint is packed, which may take hours. Raises UsageError,
    RunError or PolicyError where an option cannot be, or two exclude each other.
    """
    spec = policy if isinstance(policy, PolicySpec) else find_policy(policy)
    if learned is not None:
        spec = begin_with(spec, learned)
    given = {"slots": slots, "memory": memory, "memory_file": memory_file}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"give {' or '.join(chosen)}, not both")
    check_cache(
        slots=slots,
        memory=memory,
        host_memory=host_memory,
        context=context,
        prompt_chunk=prompt_chunk,
        scope=scope,
        horizon=horizon,
        budgeted=bool({"memory", "memory_file"} & set(chosen)),
    )
    check_link(streams, chunk, link_gbps)
    check_on_policy_error(on_policy_error)
    # A lower precision may still be given.
    refuse_unservable(spec, low=True, machine=machine is not None)
    found = find_device(device, planned=planned)
    budget = None if memory is None else budget_bytes(memory, found)
    if memory_file is not None:
        budget = read_budget(memory_file, found)
    return Settings(
        policy=spec,
        slots=slots,
        memory_bytes=budget,
        memory_file=memory_file,
        host_bytes=None if host_memory is None else read_bytes(host_memory),
        chunk_bytes=0 if chunk is None else read_bytes(chunk),
        context_tokens=context,
        prompt_chunk=prompt_chunk,
        scope=scope,
        device=found,
        streams=streams,
        link_bytes_per_s=None if link_gbps is None else link_gbps * 1e9,
        cold=cold,
        horizon=horizon,
        calibration=calibration,
        machine=machine,
        learned=learned,
        falls_back=on_policy_error == "fallback",
    )


def budget_bytes(amount: str | int, device: torch.device) -> int:
    """Bytes of a memory budget: "9GiB", "auto" or bytes. Raises RunError."""
    return amount if isinstance(amount, int) else parse_budget(amount, device)
