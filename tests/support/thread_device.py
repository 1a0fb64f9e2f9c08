"""A device on the CPU whose streams really work by themselves: a thread each, with delays."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

import torch
from moerun.links.device import StreamEvent

PATIENCE_S = 30.0
DELAYS_S = (0.0, 0.0, 0.0, 1e-5, 1e-4, 5e-4)


class ThreadEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.failure: Exception | None = None

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S)
        if self.failure is not None:
            raise self.failure


class ThreadStream:
    """Work fails at the event behind it, as a device's does."""

    def __init__(self, device: ThreadDevice, seed: int) -> None:
        self._device = device
        self._random = random.Random(seed)
        self._failure: Exception | None = None
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="stream", daemon=True)
        self.thread.start()

    def copy(self, into: torch.Tensor, record: torch.Tensor) -> None:
        assert self._device.is_pinned(record)
        number = len(self._device.queued)
        self._device.queued.append(Span.of(into))
        self._queue.put(lambda: self._device.move(number, into, record))

    def run(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def record_event(self) -> ThreadEvent:
        event = ThreadEvent()

        def reach() -> None:
            event.failure, self._failure = self._failure, None
            event.reached.set()

        self._queue.put(reach)
        return event

    def wait_event(self, event: StreamEvent) -> None:
        assert isinstance(event, ThreadEvent)
        reached = event.reached
        self._queue.put(lambda: None if reached.wait(PATIENCE_S) else _stuck())

    def end(self) -> None:
        self._queue.put(None)
        self.thread.join(PATIENCE_S)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            time.sleep(self._random.choice(DELAYS_S))
            try:
                work()
            except Exception as failure:
                self._failure = failure


class Span(NamedTuple):
    """A piece of the device's memory."""

    address: int
    n_bytes: int

    @classmethod
    def of(cls, memory: torch.Tensor) -> Span:
        return cls(memory.data_ptr(), memory.nbytes)


class ThreadDevice:
    """``queued`` is where each copy went, in the order in which they were queued.

    With ``hold_back`` copies move only as ``allow`` lets them; those of ``failing`` (numbers in
    ``queued``) fail.
    """

    def __init__(
        self, seed: int = 0, *, hold_back: bool = False, failing: frozenset[int] = frozenset()
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.queued: list[Span] = []
        self.pinned: list[Span] = []
        self.trimmed = 0
        self._failing = failing
        self._allowed = threading.Semaphore(0) if hold_back else None
        self._seed = seed
        self._opened = [ThreadStream(self, seed)]
        self.compute = self._opened[0]

    def new_stream(self) -> ThreadStream:
        stream = ThreadStream(self, self._seed + len(self._opened))
        self._opened.append(stream)
        return stream

    def allow(self, copies: int) -> None:
        assert self._allowed is not None
        self._allowed.release(copies)

    def move(self, number: int, into: torch.Tensor, record: torch.Tensor) -> None:
        if self._allowed is not None:
            assert self._allowed.acquire(timeout=PATIENCE_S)
        if number in self._failing:
            raise RuntimeError(f"copy {number} failed")
        into.copy_(record)

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned.append(Span.of(memory))

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.remove(Span.of(memory))

    def is_pinned(self, memory: torch.Tensor) -> bool:
        at, n_bytes = Span.of(memory)
        return any(a <= at and at + n_bytes <= a + n for a, n in self.pinned)

    def trim(self) -> None:
        self.trimmed += 1

    def synchronize(self) -> None:
        for stream in self._opened:
            stream.record_event().wait()

    def end(self) -> None:
        for stream in self._opened:
            stream.end()


def _stuck() -> None:
    raise AssertionError("a stream waits for an event that is never reached")
