"""A recommendation asked for: what is given is looked up, and the rest is searched for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moepolicy import find_policy
from moepolicy.amounts import NoAmountError, format_bytes, parse_bytes, unit_hint
from moepolicy.console import nearest
from moeroute.models import ATTENTION

from moesim.errors import SimulationError, UsageError
from moesim.machine.profile import Machine, load_machine, machine_names
from moesim.recommend import DISK, LEAST_BITS
from moesim.recommend.budget import Budget
from moesim.recommend.hardware import LEAVE, find_here, on_disk
from moesim.recommend.model import find_wanted
from moesim.recommend.report import Recommendation, alternatives
from moesim.recommend.search import Search


def _silent(_: str) -> None:
    """Listens to nothing."""


def recommendation(
    model: str,
    *,
    machine: str | None = None,
    memory: str | int | None = None,
    host_memory: str | int | None = None,
    link_gbps: float | None = None,
    disk: str = DISK,
    context: int | None = None,
    trace: str | None = None,
    least_bits: int = LEAST_BITS,
    precision: str | None = None,
    attention: str | None = None,
    policy: str | None = None,
    tell: Callable[[str], None] = _silent,
) -> Recommendation:
    """With which policy and options to run a model on a machine: what `moesim recommend` does.

    ``model`` is a name such as "qwen3-30b-a3b", owner/name of the hub, a config.json or a trace;
    ``machine`` a name or a profile (None: this machine); ``memory`` of the device and
    ``host_memory`` are bytes or amounts such as "9GiB"; ``link_gbps`` is in 10^9 bytes/s;
    ``context`` in tokens. ``precision``, ``attention`` and ``policy`` that are given are not
    chosen. ``tell`` is told each step of the search. Nothing is downloaded.

    Raises SimulationError, TraceError or PolicyError where there is no such thing, or nothing fits.
    """
    _check(disk, attention, policy)
    found = _hardware(machine, memory, host_memory, link_gbps)
    fixed = {"precision": precision, "attention": attention, "policy": policy}
    fixed_options = {name: value for name, value in fixed.items() if value is not None}
    with TemporaryDirectory(prefix="moesim-") as scratch:
        wanted = find_wanted(model, trace, Path(scratch))
        tokens, context_note = wanted.context(context)
        budget = Budget(found.memory_bytes, tokens, wanted.shape, found.machine.device)
        search = Search(wanted, found.machine, budget, least_bits, fixed_options, tell=tell)
        tier = _host_tier(search, found.host_bytes) if found.machine.experts_in == "host" else None
        if tier is not None:
            search.machine = on_disk(found.machine, disk, tier)
        chosen = search.run()
        final = chosen[-1].after
        if final.result is None:
            raise SimulationError(_too_small(search, found.memory_bytes))
        final = search.trial(final.options, limits=True)
        tell("alternatives")
        others = alternatives(search, final, found.memory_bytes)
    return Recommendation(
        wanted=wanted,
        machine=search.machine,
        machine_name=machine or found.machine.name,
        machine_how=found.how,
        memory_bytes=found.memory_bytes,
        context_tokens=tokens,
        context_note=context_note,
        host_memory_bytes=tier,
        steps=chosen,
        final=final,
        others=others,
    )


@dataclass(frozen=True)
class _Hardware:
    """The machine, how it was found, its memory, and the host's (None: enough for all)."""

    machine: Machine
    how: str
    memory_bytes: int
    host_bytes: int | None


def _check(disk: str, attention: str | None, policy: str | None) -> None:
    if attention is not None and attention not in ATTENTION:
        raise UsageError(f"--attention {attention}: {nearest(attention, ATTENTION)}")
    if policy is not None:
        find_policy(policy)
    if disk not in machine_names():
        load_machine(disk)


def _amount(given: str | int | None, option: str) -> int | None:
    try:
        return parse_bytes(given) if isinstance(given, str) else given
    except NoAmountError as error:
        raise UsageError(f"{option}: {error}") from None


def _hardware(
    name: str | None,
    memory_given: str | int | None,
    host_given: str | int | None,
    link_gbps: float | None,
) -> _Hardware:
    memory = _amount(memory_given, "--memory")
    host = _amount(host_given, "--host-memory")
    if name is None:
        machine, own, free, how = find_here()
        host = free if host is None else host
    else:
        machine, how = load_machine(name), name
        own = None if machine.memory_bytes is None else int(LEAVE * machine.memory_bytes)
    if link_gbps is not None:
        link = replace(machine.link, bytes_per_s=link_gbps * 1e9)
        machine = replace(machine, link=link)
    memory = own if memory is None else memory
    if memory is None:
        raise UsageError(f"nothing says how much memory {machine.name} has: give --memory")
    # Memory of a card is all there is; of a host, more may be free when the model runs.
    most = None if own is None else _up_to_mib(own / LEAVE)
    if most is not None and machine.experts_in == "host" and memory > most:
        raise UsageError(
            f"--memory {memory_given} is more than the {format_bytes(most)} of {machine.name}: "
            "give less, or the --machine that has it"
        )
    return _Hardware(machine, how, memory, host)


def _up_to_mib(n_bytes: float) -> int:
    return math.ceil(n_bytes / 2**20) * 2**20


def _host_tier(search: Search, host_bytes: int | None) -> int | None:
    """Host memory for experts where it does not hold them all at the fewest bits allowed."""
    if host_bytes is None:
        return None
    meta = search.workload.meta
    least = min(search.sizes[name] for name in search.precisions())
    return host_bytes if meta.n_layers * meta.n_experts * least > host_bytes else None


def _too_small(search: Search, memory_bytes: int) -> str:
    return (
        f"{format_bytes(memory_bytes)} of memory do not hold {search.wanted.name} without its "
        f"experts, at any precision of attention of {search.least_bits} bits or more: give more "
        "--memory, a smaller --context or fewer --least-bits"
        f"{unit_hint(memory_bytes)}"
    )
