"""What the server logs, written aside: a reader of stderr who stalls does not stop the answers.

`logging.handlers` has the queue and the thread; here is what happens when nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from threading import Thread

LOGGERS = ("moerun", "uvicorn")
MOST_WAITING = 1_000
PATIENCE_S = 2.0


@contextmanager
def written_aside() -> Iterator[None]:
    """While this lasts, a thread for each of `LOGGERS` writes its records.

    Where ``MOST_WAITING`` records wait to be written, further ones are dropped; the next line that
    is written says how many. At the end ``PATIENCE_S`` seconds are left for what waits.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [list(logger.handlers) for logger in loggers]
    listeners = [_begin(logger) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, listener in zip(loggers, before, listeners, strict=True):
            logger.handlers = handlers
            # It waits for the thread that writes, which may never be done.
            end = Thread(target=listener.stop, daemon=True)
            end.start()
            end.join(PATIENCE_S)


def _begin(logger: logging.Logger) -> QueueListener:
    """Have a thread write what a logger's handlers, or else Python's last resort, would."""
    aside = _Aside()
    handlers = logger.handlers or [logging.lastResort or logging.StreamHandler()]
    listener = _Listener(aside, *handlers)
    logger.handlers = [aside]
    listener.start()
    return listener


class _Aside(QueueHandler):
    """Drops and counts what the queue has no room for."""

    def __init__(self) -> None:
        self.waiting: Queue[logging.LogRecord | None] = Queue(MOST_WAITING)
        self.n_dropped = 0
        super().__init__(self.waiting)

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.waiting.put_nowait(record)
        except Full:
            self.n_dropped += 1  # under the handler's lock, as logging has it

    def take_dropped(self) -> int:
        """How many were dropped since it was last asked."""
        self.acquire()
        n_dropped, self.n_dropped = self.n_dropped, 0
        self.release()
        return n_dropped


class _Listener(QueueListener):
    """Says after a record how many were dropped; its end waits for room in the queue."""

    def __init__(self, aside: _Aside, *handlers: logging.Handler) -> None:
        super().__init__(aside.waiting, *handlers, respect_handler_level=True)
        self._aside = aside

    def enqueue_sentinel(self) -> None:
        self._aside.waiting.put(None)

    def handle(self, record: logging.LogRecord) -> None:
        super().handle(record)
        if n_dropped := self._aside.take_dropped():
            told = f"{n_dropped:,} lines were dropped: nobody read them in time"
            super().handle(logging.makeLogRecord({"msg": told, "levelno": logging.WARNING,
                                                  "levelname": "WARNING"}))  # fmt: skip
