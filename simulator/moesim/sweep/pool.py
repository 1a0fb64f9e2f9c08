"""Workers as processes of this machine. A process that dies is reported, with the reason, and
replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moesim.errors import SimulationError
from moesim.sweep.events import HOPELESS, Finished, Lost, PoolEvent, Ready
from moesim.sweep.point import SweepJob, SweepPoint
from moesim.sweep.worker import SweepWorker, one_thread

STOP_S = 2.0


@dataclass
class _Process:
    process: BaseProcess
    pipe: Connection
    ready: bool = False


class ProcessPool:
    """``n_workers`` processes, each computing on one thread."""

    def __init__(self, job: SweepJob, scratch: Path, n_workers: int) -> None:
        self.n_workers = n_workers
        self._job = job
        self._scratch = scratch
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Process] = {}
        self._next = 0
        self._stillborn = 0

    def start(self) -> None:
        """Start the processes."""
        for _ in range(self.n_workers):
            self._spawn()

    def _spawn(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._job, self._scratch), daemon=True
        )
        process.start()
        theirs.close()
        self._workers[self._next] = _Process(process, ours)
        self._next += 1

    def give(self, worker: int, points: Sequence[tuple[int, SweepPoint]]) -> None:
        """Send points to a process; a death is reported with the next events."""
        try:
            self._workers[worker].pipe.send(points)
        except OSError:
            return  # it has just died; the next events say so

    def events(self, timeout_s: float) -> list[PoolEvent]:
        """The messages of the processes, and the processes that have died."""
        pipes = {held.pipe: worker for worker, held in self._workers.items()}
        found: list[PoolEvent] = []
        for pipe in wait(list(pipes), timeout_s):
            assert isinstance(pipe, Connection)
            worker = pipes[pipe]
            try:
                message: Any = pipe.recv()
            except (EOFError, OSError):
                found.append(self._bury(worker))
                continue
            if message is None:
                self._workers[worker].ready = True
                self._stillborn = 0
                found.append(Ready(worker))
            else:
                found.append(Finished(worker, *message))
        return found

    def _bury(self, worker: int) -> Lost:
        dead = self._workers.pop(worker)
        dead.process.join(STOP_S)
        if dead.process.exitcode is None:  # it closed its pipe and lives on
            dead.process.kill()
            dead.process.join()
        dead.pipe.close()
        reason = f"worker process {dead.process.pid} {_how(dead.process.exitcode)}"
        if not dead.ready:
            self._stillborn += 1
            if self._stillborn >= HOPELESS:
                raise SimulationError(
                    f"{reason} before it could start, as did the {HOPELESS - 1} before it"
                )
        self._spawn()
        return Lost(worker, reason)

    def stop(self) -> None:
        """End the processes; each has STOP_S seconds to end by itself."""
        for held in self._workers.values():
            held.process.terminate()
        for held in self._workers.values():
            held.process.join(STOP_S)
            if held.process.exitcode is None:
                held.process.kill()
                held.process.join()
            held.pipe.close()
        self._workers.clear()


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, or by hand)" if -code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"
    return f"ended with code {code}"


def _work(pipe: Connection, job: SweepJob, scratch: Path) -> None:
    """A worker process: points in, outcomes out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep stops its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    one_thread()
    _die_with_parent()
    worker = SweepWorker(job, scratch)
    try:
        pipe.send(None)
        while True:
            for number, point in pipe.recv():
                pipe.send((number, worker.run(point)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _die_with_parent() -> None:
    """A worker in the middle of a long point must not outlive a sweep that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
