"""Workloads shared by the workers of a machine: read once, then mapped by each.

A workload of a million tokens takes gigabytes. Its arrays lie in one file that all workers map
copy-on-write, so that the machine holds them once, whatever the number of workers.
"""

from __future__ import annotations

import fcntl
import mmap
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from moesim.workload import Workload

_ALIGN = mmap.PAGESIZE


def shared_workload(folder: Path, name: str, load: Callable[[], Workload]) -> Workload:
    """The workload kept as ``name`` under ``folder``; whoever comes first loads it.

    ``folder`` must belong to the sweep alone: what lies there is trusted. Loading holds a lock,
    which the system releases should the loader be killed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    arrays, skeleton = folder / f"{name}.arrays", folder / f"{name}.workload"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not skeleton.exists():
            _save(load(), arrays, skeleton)
    return _attach(arrays, skeleton)


def _save(workload: Workload, arrays: Path, skeleton: Path) -> None:
    """The skeleton comes last: where it is, the arrays are whole."""
    # What is derived is derived once, here, or every worker would hold its own.
    for name, value in vars(Workload).items():
        if isinstance(value, cached_property):
            getattr(workload, name)
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(workload, protocol=5, buffer_callback=buffers.append)
    extents = []
    with arrays.open("wb") as file:
        for buffer in buffers:
            file.seek(-file.tell() % _ALIGN, 1)
            extents.append((file.tell(), len(buffer.raw())))
            file.write(buffer.raw())
        file.truncate(max(1, file.tell()))
    partial = skeleton.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((text, extents)))
    partial.replace(skeleton)


def _attach(arrays: Path, skeleton: Path) -> Workload:
    text, extents = pickle.loads(skeleton.read_bytes())
    with arrays.open("rb") as file:
        # Copy-on-write: compiled code sees plain writable arrays, the file stays as it is.
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    workload = pickle.loads(text, buffers=[mapped[at : at + size] for at, size in extents])
    assert isinstance(workload, Workload)
    return workload
