"""Links whose copies a thread makes from begin to end: a thread a stream, all of them one queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import torch

from moerun.links.base import Done, SlotLink
from moerun.links.bus import Job, Turns


class ThreadedLink(SlotLink):
    """The threads, and the bus that they hand on between the pieces of their records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As for a SlotLink."""
        super().__init__(*args, **kwargs)
        self._turns = Turns()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._guesses: SimpleQueue[Job | None] = SimpleQueue() if self.chunked else self._jobs
        self._submitted = 0
        self._travelling: dict[int, Job] = {}
        self._threads: list[threading.Thread] = []
        self._ready = threading.Barrier(len(self._scratch) + 1)

    def copy(self, stream: int, job: Job) -> None:
        """Bring the record and make the slot computable; returns when it is, or raises."""
        raise NotImplementedError

    def start(self, done: Done) -> None:
        self._done = done
        compute_threads = torch.get_num_threads()
        self._threads = [
            # A daemon: a caller that dies without closing must not hang at exit.
            threading.Thread(target=self._work, args=(i,), name=f"link-{i}", daemon=True)
            for i in range(len(self._scratch))
        ]
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        # Setting it in one thread makes it the default of all that are yet to come.
        torch.set_num_threads(compute_threads)

    def submit(self, key: int, slot: int, low: bool = False, *, demand: bool = True) -> None:
        self._submitted += 1
        job = Job(key, slot, low, time.perf_counter(), self._submitted, demand)
        self._travelling[key] = job
        (self._jobs if demand else self._guesses).put(job)

    def want(self, key: int) -> None:
        if (job := self._travelling.get(key)) is not None:
            self._turns.want(job)

    def pieces(self, job: Job, n_bytes: int) -> Iterator[slice]:
        """The pieces of a record, each while it has the bus; all of it at once if not chunked."""
        if not self.chunked:
            yield slice(0, n_bytes)
            return
        for at in range(0, n_bytes, self._chunk_bytes):
            end = min(at + self._chunk_bytes, n_bytes)
            self._turns.take(job)
            yield slice(at, end)
            if self._throttle:
                self.sleep_until(self._throttle.deadline_s(job.begin_s, end - at))
        self._turns.give(job)

    def close(self) -> None:
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
        ended_s = reported_s = 0.0
        jobs = self._jobs if stream < self.streams else self._guesses
        while (job := jobs.get()) is not None:
            # What is asked for while the copy before it is being reported follows without a gap,
            # as on a bus that has its next command queued.
            chained = job.submitted_s <= reported_s
            job.begin_s = ended_s if chained else job.submitted_s
            ended_s = self._carry(stream, job)
            reported_s = time.perf_counter()

    def _travelled(self, job: Job) -> None:
        # Who measures the link may have one record travel to two slots at once.
        if self._travelling.get(job.key) is job:
            del self._travelling[job.key]

    def _carry(self, stream: int, job: Job) -> float:
        """Copy, wait for the cap, report; returns when the copy ended."""
        assert self._done is not None
        n_bytes = self._bytes[job.low]
        try:
            self.copy(stream, job)
        except Exception as error:
            self._turns.give(job)  # it may have failed in the middle of a piece
            self._travelled(job)
            self._done(job.key, error)
            return time.perf_counter()
        self._travelled(job)
        ended_s = time.perf_counter()
        if self._throttle and not self.chunked:
            deadline_s = self._throttle.deadline_s(job.begin_s, n_bytes)
            self.sleep_until(deadline_s)
            ended_s = max(ended_s, deadline_s)
        self.count(n_bytes, ended_s - job.begin_s)
        self._done(job.key, None)
        return ended_s
