"""The process that talks to Ray: it starts actors, passes points on, and reports dead workers.

The process speaks with `moesim.sweep.ray_pool` over a pipe and ends when the pipe closes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moepolicy.outputs import drop_tree

from moesim.sweep.digests import code_digest
from moesim.sweep.events import HOPELESS, Connected, Finished, Gone, Lost, Ready
from moesim.sweep.point import SweepJob, SweepPoint
from moesim.sweep.worker import Outcome, SweepWorker, one_thread

REACH_S = 5.0
GONE_S = 15.0  # a cluster that cannot be reached for so long is given up
CHECK_S = 1.0
IDLE_S = 60.0  # no worker, and Ray has no place for one
WAIT_S = 0.05
CLEAN_S = 10.0
OBJECT_STORE_BYTES = 100 << 20  # hardly anything is kept there
JOIN_S = 60.0  # a client server that refuses is asked again for so long
JOIN_PAUSE_S = 2.0


class NodeWorker:
    """A worker as an actor on some node. The workers of a node share its copy of a workload."""

    def __init__(self, job: SweepJob, token: str) -> None:
        one_thread()
        self.node = socket.gethostname()
        self.worker = SweepWorker(job, node_scratch(token), self.node)

    def hello(self) -> tuple[str, str]:
        """The node's name, and the digest of its code of moesim."""
        return self.node, code_digest()

    def run(self, point: SweepPoint) -> Outcome:
        """Run one point on this node."""
        return self.worker.run(point)


def node_scratch(token: str) -> Path:
    """The folder of a sweep's workloads on a node; the token cannot be guessed."""
    return Path(tempfile.gettempdir(), f"moesim-{token}")


def clean(token: str) -> None:
    """Remove a sweep's workloads from this node."""
    drop_tree(node_scratch(token))


def drive(
    pipe: Connection, address: str | None, job: SweepJob, n_workers: int | None, log: Path
) -> None:
    """Serve the pool at the other end of ``pipe`` until that end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        server = _connect(address, n_workers)
        n_workers = n_workers or _cpus()
    except Exception as error:
        pipe.send(Gone(f"cannot be used ({_reason(error)})"))
        return
    driver = _Driver(pipe, job)
    driver.send(Connected(n_workers))
    threading.Thread(target=driver.listen, daemon=True).start()
    threading.Thread(target=driver.watch, args=(server,), daemon=True).start()
    try:
        driver.run(n_workers)
    except ConnectionError as error:
        driver.send(Gone(f"went away ({str(error).splitlines()[0]})"))
        os._exit(1)
    driver.leave()


def _connect(address: str | None, n_workers: int | None) -> tuple[str, int]:
    """Join or start a cluster; returns the address that must stay reachable."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # The switch under which Ray keeps to the loopback interface, on any system.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        # Ray takes minutes to find out that nobody is there.
        socket.create_connection(_server(address), timeout=REACH_S).close()
    import ray

    if address is None:
        ray.init(
            address="local",
            num_cpus=n_workers,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    else:
        _join(address)
    return _server(address or ray.get_runtime_context().gcs_address)


def _join(address: str) -> None:
    """Join the cluster at ``address``.

    A client server starts a process for each client. On a busy machine the process can come too
    late, and the server then refuses that client (ConnectionAbortedError) but not the next one.
    """
    import ray

    until = time.monotonic() + JOIN_S
    while True:
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except ConnectionAbortedError:
            if time.monotonic() > until:
                raise
            ray.shutdown()
            time.sleep(JOIN_PAUSE_S)


def _server(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host.strip("[]"), int(port)


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


@dataclass
class _Actor:
    handle: Any
    name: str = "a node not yet known"
    ready: bool = False
    calls: list[Any] = field(default_factory=list)


class _Driver:
    def __init__(self, pipe: Connection, job: SweepJob) -> None:
        import ray

        self._ray = ray
        self._pipe = pipe
        self._sending = threading.Lock()
        self._changing = threading.Lock()
        self._token = uuid.uuid4().hex
        self._job = ray.put(job)
        self._class = ray.remote(NodeWorker)
        self._actors: dict[int, _Actor] = {}
        self._calls: dict[Any, tuple[int, int | None]] = {}  # -> worker, point (None: hello)
        self._next = 0
        self._stillborn = 0
        self._closed = threading.Event()
        self._alone_since = time.monotonic()

    def send(self, message: Any) -> None:
        with self._sending, suppress(OSError):
            self._pipe.send(message)

    def listen(self) -> None:
        """Pass points on to the actors as they come."""
        try:
            while True:
                worker, points = self._pipe.recv()
                with self._changing:
                    actor = self._actors.get(worker)
                    if actor is None:
                        continue  # died meanwhile, and that has been told
                    for number, point in points:
                        call = actor.handle.run.remote(point)
                        actor.calls.append(call)
                        self._calls[call] = worker, number
        except (EOFError, OSError):
            self._closed.set()

    def watch(self, server: tuple[str, int]) -> None:
        """End before Ray does: without its server Ray hangs for a minute, and then ends the
        process."""
        seen = time.monotonic()
        while not self._closed.wait(CHECK_S):
            try:
                socket.create_connection(server, timeout=CHECK_S).close()
                seen = time.monotonic()
            except OSError as error:
                if time.monotonic() - seen > GONE_S:
                    self.send(Gone(f"went away ({server[0]}:{server[1]}: {error})"))
                    os._exit(1)

    def run(self, n_workers: int) -> None:
        """Start ``n_workers`` actors and report the outcomes of their calls until the pipe
        closes."""
        for _ in range(n_workers):
            self._hire()
        while not self._closed.is_set():
            with self._changing:
                calls = list(self._calls)
            if not calls:
                self._closed.wait(WAIT_S)
                continue
            done, _ = self._ray.wait(calls, num_returns=1, timeout=WAIT_S)
            for call in done:
                self._collect(call)
            self._check_alone()

    def _hire(self) -> None:
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        handle = self._class.options(**options).remote(self._job, self._token)
        with self._changing:
            actor = self._actors[self._next] = _Actor(handle)
            call = handle.hello.remote()
            actor.calls.append(call)
            self._calls[call] = self._next, None
            self._next += 1

    def _collect(self, call: Any) -> None:
        if call not in self._calls:
            return
        worker, number = self._calls[call]
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._lose(worker, error)
            return
        with self._changing:
            del self._calls[call]
            actor = self._actors[worker]
            actor.calls.remove(call)
        if number is not None:
            self.send(Finished(worker, number, answer))
            return
        actor.name, theirs = answer
        if theirs != code_digest():
            self.send(Gone(f"has another moesim on {actor.name} than there is here"))
            os._exit(1)
        actor.ready = True
        self._stillborn = 0
        self.send(Ready(worker))

    def _lose(self, worker: int, error: Exception) -> None:
        with self._changing:
            actor = self._actors.pop(worker)
            for call in actor.calls:
                del self._calls[call]
        with suppress(Exception):
            self._ray.kill(actor.handle)  # one that was only unreachable must not come back
        reason = f"Ray worker {worker} on {actor.name} died ({_reason(error)})"
        if not actor.ready:
            self._stillborn += 1
            if self._stillborn >= HOPELESS:
                self.send(Gone(f"cannot run workers: {reason}"))
                os._exit(1)
        self.send(Lost(worker, reason))
        self._hire()

    def _check_alone(self) -> None:
        """Report that no node has a place for an actor: such actors wait for ever without a
        message."""
        if any(actor.ready for actor in self._actors.values()):
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > IDLE_S:
            self.send(Gone(f"has had no free CPU for a worker in {IDLE_S:.0f} s"))
            os._exit(1)

    def leave(self) -> None:
        """Remove everything of this sweep from the nodes."""
        ray = self._ray
        threading.Timer(2 * CLEAN_S, os._exit, (1,)).start()
        with suppress(Exception):
            for actor in self._actors.values():
                ray.kill(actor.handle)
            cleaning = [
                ray.remote(clean)
                .options(
                    num_cpus=0,
                    scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                        node["NodeID"], soft=False
                    ),
                )
                .remote(self._token)
                for node in ray.nodes()
                if node["Alive"]
            ]
            ray.wait(cleaning, num_returns=len(cleaning), timeout=CLEAN_S)
            ray.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _reason(error: Exception) -> str:
    """Ray's reason for a failure, without Ray's pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "node" in line.lower() or "Error:" in line]
    return (telling or lines or [type(error).__name__])[-1]
