"""Devices by name, the memory that they have free, and the threads of the CPU."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moerun.amounts import format_bytes
from moerun.errors import RunError
from moerun.ranges import check_device, check_threads


def find_device(name: str, *, planned: bool = False) -> torch.device:
    """cpu, cuda, cuda:N or auto (the first GPU, else the CPU). Raises RunError for any other.

    ``planned``: nothing is to run there, so the device need not be here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    check_device(name)
    index = int(name.partition(":")[2] or 0)
    if planned:
        return torch.device("cuda", index)
    if not torch.cuda.is_available():
        raise RunError(f"device '{name}' is not there: torch sees no CUDA GPU; use --device cpu")
    if index >= torch.cuda.device_count():
        raise RunError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def is_here(device: torch.device) -> bool:
    """Whether this machine has a device; a plan may be made for one that it has not."""
    return device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()


def use_threads(asked: int | None) -> None:
    """Let compute on the CPU use so many threads; None leaves a core to the link.

    Threads that wait for each other at every operation lose far more than a core's worth when one
    of them has to share.
    """
    if asked is None:
        # sched_getaffinity knows of containers and taskset; not every system has it.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        asked = max(1, min(torch.get_num_threads(), (cores or 1) - 1))
    check_threads(asked)
    torch.set_num_threads(asked)


def freeze_loaded_objects() -> None:
    """Leave everything loaded until now out of Python's garbage collections.

    The model libraries make so many objects that one full collection stops decoding for a third
    of a second.
    """
    gc.collect()
    gc.freeze()


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is ours, too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    limits = [_proc("/proc/meminfo", "MemAvailable"), _group_room()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def who_holds(device: torch.device) -> str:
    """What else a full GPU's memory is used for, to end an error's clause with; "" if nothing."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return (
        f" ({format_bytes(free)} of {format_bytes(total)} are; other programs and CUDA itself "
        f"hold {format_bytes(others)})"
    )


@contextmanager
def naming_lack_of_memory(device: torch.device, doing: str) -> Iterator[None]:
    """Turns a GPU's out-of-memory error into a RunError that says who holds its memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{device} ran out of memory while {doing}{who_holds(device)}: use fewer slots or less "
            "--memory, or end what else uses it"
        ) from error


def _proc(file: str, name: str) -> int | None:
    """An entry, in bytes, of a file that the kernel writes so; None on systems without."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(fields[1]) * 1024 for fields in found), None)


def _group_room() -> int | None:
    """What is left of a container's limit (cgroup v2); None without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Cached files are given up when memory is asked for.
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)


def resident_bytes() -> int:
    """What this process has in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_host_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_host_bytes() -> int:
    """The most resident memory this process has had."""
    # Not getrusage where it can be helped: a process inherits its maximum from who started it.
    if (found := _proc("/proc/self/status", "VmHWM")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """The most device memory that torch has held at once; None where that is the host's."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.max_memory_allocated(device))
