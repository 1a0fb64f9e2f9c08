"""Links whose copies a thread makes from begin to end: a thread a stream, all of them one queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from moerun.errors import as_error
from moerun.links.base import Done, SlotLink
from moerun.links.bus import BusArbiter, Job, Pieces
from moerun.links.slot import Variant


class ThreadedLink(SlotLink):
    """The threads, and the bus that they hand on between the pieces of their records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As for a SlotLink."""
        super().__init__(*args, **kwargs)
        self._bus = BusArbiter()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._guesses: SimpleQueue[Job | None] = SimpleQueue() if self.chunked else self._jobs
        self._submitted = 0
        self._travelling: dict[int, Job] = {}
        self._threads: list[threading.Thread] = []
        self._ready = threading.Barrier(self.n_streams + 1)

    def copy(self, stream: int, job: Job, pieces: Pieces | None) -> None:
        """Bring the record, in ``pieces`` if they are given, and make the slot computable.

        Returns when it is, or raises.
        """
        raise NotImplementedError

    def start(self, done: Done) -> None:
        """Start a thread for each stream; compute keeps the number of threads that it had."""
        self._done = done
        compute_threads = torch.get_num_threads()
        self._threads = [
            # A daemon: a caller that dies without closing must not hang at exit.
            threading.Thread(target=self._work, args=(i,), name=f"link-{i}", daemon=True)
            for i in range(self.n_streams)
        ]
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        # Setting it in one thread makes it the default of all that are yet to come.
        torch.set_num_threads(compute_threads)

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        """Queue a copy of the record of ``key`` into ``slot`` for a thread, and return at once."""
        self._submitted += 1
        begin_s = time.perf_counter() if begin_s is None else begin_s
        job = Job(key, slot, variant, begin_s, self._submitted, demand)
        self._travelling[key] = job
        (self._jobs if demand else self._guesses).put(job)

    def want(self, key: int) -> None:
        """Demand a prefetch under way, so that it has the bus before other prefetches."""
        if (job := self._travelling.get(key)) is not None:
            self._bus.want(job)

    def close(self) -> None:
        """End the threads after the copies under way."""
        self._closing = True  # nobody waits for a capped copy any more
        for i in range(len(self._threads)):
            (self._jobs if i < self.streams else self._guesses).put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self._done = None  # so that a session and its slots go when their last user does

    def _work(self, stream: int) -> None:
        # Deriving a slot from its record must not crowd out compute. A thread takes over the
        # count when it first asks for it.
        torch.set_num_threads(1)
        torch.get_num_threads()
        self._ready.wait()
        jobs = self._jobs if stream < self.streams else self._guesses
        free_s = 0.0  # when the copy before ended: one that waited for it begins then
        while (job := jobs.get()) is not None:
            begin_s = max(job.begin_s, free_s)
            error, free_s = self._carry(stream, job, begin_s)
            self._report(job, error, begin_s, free_s)

    def _carry(self, stream: int, job: Job, begin_s: float) -> tuple[Exception | None, float]:
        """Copy, and wait for the cap; what went wrong, and when the copy ended."""
        pieces = partial(self._pieces, job, begin_s) if self.chunked else None
        try:
            self.copy(stream, job, pieces)
        except BaseException as error:
            self._bus.release(job)  # it may have failed in the middle of a piece
            return as_error(error), time.perf_counter()
        ended_s = time.perf_counter()
        if self._throttle and not self.chunked:
            deadline_s = self._throttle.deadline_s(begin_s, self._sizes[job.variant])
            self.sleep_until(deadline_s)
            ended_s = max(ended_s, deadline_s)
        return None, ended_s

    def _pieces(self, job: Job, begin_s: float, n_bytes: int) -> Iterator[slice]:
        """The pieces of a record, each while it has the bus, for as long as the cap says."""
        for at in range(0, n_bytes, self._chunk_bytes):
            end = min(at + self._chunk_bytes, n_bytes)
            self._bus.acquire(job)
            yield slice(at, end)
            if self._throttle:
                self.sleep_until(self._throttle.deadline_s(begin_s, end - at))
        self._bus.release(job)

    def _report(self, job: Job, error: Exception | None, begin_s: float, ended_s: float) -> None:
        assert self._done is not None
        # Who measures the link may have one record travel to two slots at once.
        if self._travelling.get(job.key) is job:
            del self._travelling[job.key]
        if error is None:
            self.count(self._sizes[job.variant], ended_s - begin_s)
        self._done(job.key, error, ended_s)
