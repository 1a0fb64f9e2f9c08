"""Devices by name, and amounts of memory as people write them."""

from __future__ import annotations

import gc
import os
import re
import resource
import sys

import torch

from moerun.errors import RunError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}


def find_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N or auto (the first GPU, else the CPU). Raises RunError for any other."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not found:
        raise RunError(f"unknown device '{name}'; there are: auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise RunError(f"device '{name}' is not there: torch sees no CUDA GPU; use --device cpu")
    index = int(found[1] or 0)
    if index >= torch.cuda.device_count():
        raise RunError(f"device '{name}' is not there: {torch.cuda.device_count()} GPUs are")
    return torch.device("cuda", index)


def use_threads(asked: int | None) -> None:
    """Let compute on the CPU use so many threads; None leaves a core to the link.

    Threads that wait for each other at every operation lose far more than a core's worth when one
    of them has to share.
    """
    if asked is None:
        # sched_getaffinity knows of containers and taskset; not every system has it.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        asked = max(1, min(torch.get_num_threads(), (cores or 1) - 1))
    if asked < 1:
        raise RunError(f"threads must be 1 or more, not {asked}")
    torch.set_num_threads(asked)


def calm_collector() -> None:
    """Leave everything loaded until now out of Python's garbage collections.

    The model libraries make so many objects that one full collection stops decoding for a third
    of a second.
    """
    gc.collect()
    gc.freeze()


def parse_bytes(text: str) -> int:
    """9GiB, 500 MB, 1.5GiB or plain bytes. Raises RunError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise RunError(f"'{text}' is no amount of memory: write it as 9GiB, 500MB or bytes")
    return int(float(found[1]) * units[found[2].lower()])


def format_bytes(n_bytes: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if n_bytes >= UNITS[unit]:
            return f"{n_bytes / UNITS[unit]:.2f} {unit}"
    return f"{n_bytes} bytes"


def peak_host_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """The most device memory that torch has held at once; None where that is the host's."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.max_memory_allocated(device))
