"""Workloads shared by the workers of a machine: read once into files, then mapped by each."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

from moepolicy.outputs import drop_tree, naming

from moesim.workload.loading import attached
from moesim.workload.steps import Workload


def shared_workload(folder: Path, name: str, load: Callable[[Path], object]) -> Workload:
    """The workload kept as ``name`` under ``folder``; the first caller loads it there.

    ``folder`` must belong to the sweep alone: its files are trusted. A lock is held while loading;
    the system releases the lock if the loader is killed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place, partial = folder / name, folder / f"{name}.partial"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            drop_tree(partial)
            partial.mkdir()
            with naming(partial):
                load(partial)
            partial.replace(place)
    return attached(place)
