"""How a store is to be run, as users write it: read and checked for commands and programs alike."""

from __future__ import annotations

from pathlib import Path

import torch
from moepolicy import PolicySpec, find_policy

from moerun.amounts import parse_bytes
from moerun.devices import find_device
from moerun.errors import UsageError
from moerun.links.base import check_ways
from moerun.live.assembly import check_rate
from moerun.memory.budget import parse_budget, read_budget
from moerun.policies import refuse_unservable
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
    scope: str = "layer",
    cold: bool = False,
    horizon: int | None = None,
    calibration: str | None = None,
) -> Settings:
    """The settings that these options ask for, with no store of a lower precision yet.

    Sizes are bytes or texts with a unit ("9GiB"); ``memory`` may be "auto", too; ``link_gbps`` is
    in 10^9 bytes/s. To be called before a checkpoint is packed, which may take hours. Raises
    UsageError, RunError or PolicyError where an option cannot be, or two exclude each other.
    """
    spec = policy if isinstance(policy, PolicySpec) else find_policy(policy)
    given = {"slots": slots, "memory": memory, "memory_file": memory_file}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"give {' or '.join(chosen)}, not both")
    if context is not None and context < 2:
        raise UsageError(f"context must be 2 or more tokens, not {context}")
    if context is not None and chosen in ([], ["slots"]):
        raise UsageError("context is what memory plans for: give that, too")
    if horizon is not None and horizon < 0:
        raise UsageError(f"horizon must be 0 or more, not {horizon}")
    refuse_unservable(spec, low=True)  # a lower precision may still be given
    chunk_bytes = 0 if chunk is None else read_bytes(chunk)
    check_ways(streams, chunk_bytes)
    if scope not in ("layer", "global"):
        raise UsageError(f"unknown scope '{scope}': it is 'layer' or 'global'")
    if link_gbps is not None:
        check_rate(link_gbps * 1e9)
    found = find_device(device)
    budget = None if memory is None else budget_bytes(memory, found)
    if memory_file is not None:
        budget = read_budget(memory_file, found)
    return Settings(
        policy=spec,
        slots=slots,
        memory_bytes=budget,
        memory_file=memory_file,
        host_bytes=None if host_memory is None else read_bytes(host_memory),
        chunk_bytes=chunk_bytes,
        context_tokens=context,
        scope=scope,
        device=found,
        streams=streams,
        link_bytes_per_s=None if link_gbps is None else link_gbps * 1e9,
        cold=cold,
        horizon=horizon,
        calibration=calibration,
    )


def budget_bytes(amount: str | int, device: torch.device) -> int:
    """Bytes of a memory budget: "9GiB", "auto" or bytes. Raises RunError."""
    return amount if isinstance(amount, int) else parse_budget(amount, device)


def read_bytes(amount: str | int) -> int:
    """Bytes of "9GiB", or as they are. Raises RunError."""
    return amount if isinstance(amount, int) else parse_bytes(amount)
