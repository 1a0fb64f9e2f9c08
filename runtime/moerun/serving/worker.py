"""The one thread that generates, and the bounded queue of those who wait for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from moepolicy import PolicyError

from moerun.errors import RunError
from moerun.live.generate import NO_WORK, Generated, Generation, Work
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling

LOG = logging.getLogger("moerun")


class Piece(NamedTuple):
    """More text, of the answer or of the reasoning before it."""

    text: str
    reasoning: bool = False


class Completed(NamedTuple):
    """The answer is complete, or as complete as it gets: see ``ending``."""

    generated: Generated


class Failed(NamedTuple):
    """The generation ended in an error; the next one starts from a cold cache."""

    error: BaseException


class NotBegun(NamedTuple):
    """The job was never begun: the server is shutting down."""


AnswerEvent = Piece | Completed | Failed | NotBegun


class QueueFull(Exception):
    """The queue is full: ``waiting_limit`` requests wait already."""


class GenerationJob:
    """One prompt to be answered.

    ``tell`` is called from the worker's thread; the last event that it gets is no Piece.
    """

    def __init__(
        self, prompt_ids: torch.Tensor, sampling: Sampling, tell: Callable[[AnswerEvent], None]
    ) -> None:
        self.prompt_ids = prompt_ids  # int64[1, tokens]
        self.sampling = sampling
        self.tell = tell
        self.generation: Generation | None = None


class GenerationWorker:
    """Answers jobs one after the other on a thread of its own, whatever goes wrong in one.

    ``observe`` is told, from that thread, of each job: the work done since the last call, and
    how it ended (as in Generated, or "error").
    """

    def __init__(
        self,
        runner: Runner,
        waiting_limit: int,
        observe: Callable[[Work, str], None],
    ) -> None:
        self.waiting_limit = waiting_limit
        self.work = NO_WORK
        """All that has been done."""
        self._runner = runner
        self._observe = observe
        self._waiting: deque[GenerationJob] = deque()
        self._running: GenerationJob | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._seen = runner.session.totals
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their turn."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether an answer is in progress."""
        return self._running is not None

    @property
    def accepting(self) -> bool:
        """Whether a new job would be answered: the thread lives and is not closing."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: GenerationJob) -> None:
        """Queue a job. Raises QueueFull when ``waiting_limit`` jobs wait already."""
        with self._changed:
            if self._closing:
                job.tell(NotBegun())
                return
            # One of them need not wait: the one that runs, or is about to.
            if len(self._waiting) + self.busy > self.waiting_limit:
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: GenerationJob) -> None:
        """Cancel ``job``, whose client has gone. Harmless when the job has ended."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is self._running and job.generation is not None:
                job.generation.cancel()

    def drain(self) -> None:
        """Begin no job; jobs that wait are refused, and the job in progress goes on."""
        with self._changed:
            self._closing = True
            while self._waiting:
                self._waiting.popleft().tell(NotBegun())
            self._changed.notify_all()

    def cancel_running(self) -> None:
        """Cancel the answer in progress, if there is one."""
        with self._changed:
            if self._running is not None and self._running.generation is not None:
                self._running.generation.cancel()

    def close(self) -> None:
        """Cut the answer in progress short and end the thread."""
        self.drain()
        self.cancel_running()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            event = self._answer(job)
            with self._changed:
                self._running = None
            # Told last: whoever hears it may come again at once, and finds the worker free.
            job.tell(event)

    def _next(self) -> GenerationJob | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            job = self._waiting.popleft()
            # Made under the lock, so that whoever cancels finds it.
            job.generation = self._runner.generation(
                lambda text: job.tell(Piece(text)), lambda text: job.tell(Piece(text, True))
            )
            self._running = job
            return job

    def _answer(self, job: GenerationJob) -> Completed | Failed:
        generation = job.generation
        assert generation is not None
        try:
            generated = generation.run(job.prompt_ids, job.sampling)
        except BaseException as error:  # a policy may raise anything; the next job must be served
            expected = isinstance(error, (RunError, PolicyError, OSError))
            LOG.error("error: %s", error, exc_info=None if expected else error)
            self._account(generation, "error")
            self._recover()
            return Failed(error)
        self._account(generation, generated.ending)
        return Completed(generated)

    def _account(self, generation: Generation, ending: str) -> None:
        # Copies that ended between two jobs belong to neither; here they are counted.
        totals = self._runner.session.totals
        outcome = generation.outcome()
        done = replace(outcome, totals=totals.since(self._seen))
        self._seen = totals
        self.work += done
        self._observe(done, ending)

    def _recover(self) -> None:
        """Make the session fit to serve again."""
        try:
            self._runner.session.reset()
        except Exception:  # a policy that cannot be made; its next job will say so again
            return
        if self._runner.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        self._seen = self._runner.session.totals
