"""The server's life: it listens, and on a signal lets the answer in progress end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from moerun.serving.limits import CONNECTIONS, HEAD_BYTES, BoundedProtocol
from moerun.serving.logs import written_aside
from moerun.serving.worker import GenerationWorker

SLACK_S = 10.0  # for a cancelled answer's last layer, or token, and the goodbye to its client


class Server(uvicorn.Server):
    """Serves ``app`` until a signal; then the worker's answer in progress has ``drain_s`` left."""

    def __init__(
        self,
        app: Any,
        worker: GenerationWorker,
        *,
        drain_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                http=BoundedProtocol,
                ws="none",
                h11_max_incomplete_event_size=HEAD_BYTES,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(drain_s + SLACK_S)),
            )
        )
        self._worker = worker
        self._drain_s = drain_s
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then tell the caller."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the answer in progress end within ``drain_s`` seconds, then stop to listen."""
        self._worker.drain()
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._worker.cancel_running)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def serve_on(self, taken: socket.socket) -> bool:
        """Serve until a signal ends the server; True when the signal was an interrupt."""
        with _collected_signals() as signals, written_aside():
            self._worker.start()
            try:
                self.run(sockets=[taken])
            finally:
                self._worker.close()
        return signal.SIGINT in signals


@contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """uvicorn raises again, at its end, the signals that ended it: they shall only be noted."""
    collected: list[int] = []

    def note(number: int, _frame: Any) -> None:
        collected.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield collected
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
