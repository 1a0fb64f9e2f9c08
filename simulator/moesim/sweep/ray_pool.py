"""Workers on a Ray cluster, with the same interface as processes of this machine.

Ray's driver runs in a process of its own. When the driver's cluster goes away, the driver hangs or
ends its process; the sweep must go on in both cases, and end with a clear error.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moesim.errors import SimulationError, UsageError
from moesim.sweep.events import Connected, Gone, PoolEvent
from moesim.sweep.point import SweepJob, SweepPoint

START_S = 120.0
LEAVE_S = 30.0  # to leave the cluster tidy


def ray_address(on: str) -> str | None:
    """The address in ``--on``; None for a Ray on this machine. Raises SimulationError.

    ray://host:port is a cluster's client server; host:port is the cluster that this machine is part
    of.
    """
    if on == "ray":
        return None
    scheme, _, rest = on.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise UsageError(
            f"--on is '{on}': it is local, ray, ray://host:port (a Ray client server) or "
            "host:port (the cluster this machine is a node of)"
        )
    return on


class RayPool:
    """``n_workers`` actors (by default one for every CPU of the cluster), wherever Ray puts them.

    ``log`` receives Ray's messages.
    """

    def __init__(self, job: SweepJob, on: str, n_workers: int | None, log: Path) -> None:
        if importlib.util.find_spec("ray") is None:
            raise SimulationError(
                f"--on {on} needs Ray, which is not installed: pip install 'moe-offload-lab[ray]'"
            )
        self.n_workers = n_workers or 1
        self._on = on
        self._where = "the Ray of this machine" if on == "ray" else f"the Ray cluster at {on}"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Imported by the process only: `ray` must not be needed here.
        self._process = context.Process(
            target=_drive, args=(theirs, ray_address(on), job, n_workers, log)
        )
        self._theirs = theirs

    def start(self) -> None:
        """Start the driver. Raises SimulationError where no cluster can be reached."""
        self._process.start()
        self._theirs.close()
        if not self._pipe.poll(START_S):
            raise SimulationError(f"{self._where} did not answer in {START_S:.0f} s")
        first = self._receive()
        assert isinstance(first, Connected)
        self.n_workers = first.n_workers

    def give(self, worker: int, points: Sequence[tuple[int, SweepPoint]]) -> None:
        """Send points to a worker by way of the driver; the next events report a worker that is
        gone."""
        try:
            self._pipe.send((worker, list(points)))
        except OSError:
            return  # the driver is gone; the next events say so

    def events(self, timeout_s: float) -> list[PoolEvent]:
        """The driver's messages about the workers."""
        found: list[PoolEvent] = []
        while self._pipe.poll(0 if found else timeout_s):
            found.append(self._receive())
        return found

    def _receive(self) -> Any:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(LEAVE_S)
            raise SimulationError(
                f"{self._where} went away: its driver ended with code {self._process.exitcode}"
            ) from None
        if isinstance(message, Gone):
            raise SimulationError(f"{self._where} {message.reason}")
        return message

    def stop(self) -> None:
        """Close the pipe, and give the driver LEAVE_S seconds to clean the cluster up."""
        if self._process.pid is None:
            return
        self._pipe.close()  # which tells the driver to leave the cluster tidy
        self._process.join(LEAVE_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _drive(
    pipe: Connection, address: str | None, job: SweepJob, n_workers: int | None, log: Path
) -> None:
    from moesim.sweep.ray_driver import drive

    drive(pipe, address, job, n_workers, log)
