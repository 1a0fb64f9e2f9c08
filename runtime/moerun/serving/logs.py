"""What the server logs, written aside: a reader of stderr who stalls does not stop the answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    asides = [_Aside(handlers or [_last_resort()]) for handlers in before]
    for logger, aside in zip(loggers, asides, strict=True):
        logger.handlers = [aside]
    try:
        yield
    finally:
        for logger, handlers, aside in zip(loggers, before, asides, strict=True):
            logger.handlers = handlers
            aside.finish()


def _last_resort() -> logging.Handler:
    """What writes the records of a logger without a handler: Python's own, to stderr."""
    return logging.lastResort or logging.StreamHandler()


class _Aside(logging.Handler):
    """Hands records to a thread that hands them to ``handlers``."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self._handlers = handlers
        self._waiting: Queue[logging.LogRecord | None] = Queue(MOST_WAITING)
        self._dropped = 0
        self._thread = Thread(target=self._write, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let a record be written soon, or drop it; under the handler's lock, as logging has it."""
        try:
            self._waiting.put_nowait(record)
        except Full:
            self._dropped += 1

    def finish(self) -> None:
        """Wait for what is still to be written, if somebody reads it."""
        with suppress(Full):
            self._waiting.put(None, timeout=PATIENCE_S)
        self._thread.join(PATIENCE_S)

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._hand_on(record)
            self.acquire()
            dropped, self._dropped = self._dropped, 0
            self.release()
            if dropped:
                told = f"{dropped:,} lines were dropped: nobody read them in time"
                self._hand_on(_warning(told))

    def _hand_on(self, record: logging.LogRecord) -> None:
        for handler in self._handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


def _warning(told: str) -> logging.LogRecord:
    return logging.LogRecord("moerun", logging.WARNING, __file__, 0, told, None, None)
