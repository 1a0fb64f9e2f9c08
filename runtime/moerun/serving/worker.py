"""The one thread that generates, and the bounded queue of those who wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from moepolicy import PolicyError
from moeroute import TraceError
from transformers import LogitsProcessor

from moerun.errors import RunError
from moerun.live.batch import Batch, BatchedGeneration
from moerun.live.generate import Generation
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import NO_WORK, Generated, Work

LOG = logging.getLogger("moerun")


class Piece(NamedTuple):
    """More text, of the answer or of the reasoning before it; ``tokens`` of the answer were there
    when it came."""

    text: str
    reasoning: bool = False
    tokens: int = 0


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


class Wanted(NamedTuple):
    """An answer to be generated.

    prompt_ids  int64[1, tokens]
    constraint  what forbids tokens that a grammar has no place for
    """

    prompt_ids: torch.Tensor
    sampling: Sampling
    constraint: LogitsProcessor | None = None


class GenerationJob:
    """One prompt to be answered.

    ``tell`` is called from the worker's thread; the last event that it gets is no Piece.
    """

    def __init__(self, wanted: Wanted, tell: Callable[[AnswerEvent], None]) -> None:
        self.wanted = wanted
        self.tell = tell
        self.generation: Generation | None = None
        self.submitted_s = time.perf_counter()

    @property
    def prompt_ids(self) -> torch.Tensor:
        """The prompt, int64[1, tokens]."""
        return self.wanted.prompt_ids

    def begin(self, runner: Runner, *, batched: bool) -> Generation:
        """Make the generation, not begun yet, that tells its text as it comes."""

        def piece(text: str, reasoning: bool = False) -> None:
            self.tell(Piece(text, reasoning, len(generation.token_ids)))

        made = runner.batched_generation if batched else runner.generation
        generation = made(piece, lambda text: piece(text, True), reuse=True)
        self.generation = generation
        return generation


class Ended(NamedTuple):
    """A job that has ended, for whoever counts.

    work         done since the last job ended
    ending       as in Generated, or "error"
    submitted_s  when the job came, by the clock of `time.perf_counter`
    token_s      when each of its tokens came
    """

    work: Work
    ending: str
    submitted_s: float
    token_s: list[float]


class GenerationWorker:
    """Answers jobs on a thread of its own, whatever goes wrong in one: one after the other, or as
    many together as the runner's settings plan for.

    A request may have several jobs. Requests that wait take turns, a job at a time: one with many
    prompts does not keep the others waiting until its last. ``observe`` is told, from that thread,
    of each job that has ended.

    The class is long because all that touches the queue, from the server's thread or the worker's
    own, stands under its one lock.
    """

    def __init__(
        self,
        runner: Runner,
        waiting_limit: int,
        observe: Callable[[Ended], None],
        *,
        recording: LiveRecording | None = None,
    ) -> None:
        self._recording = recording
        self.waiting_limit = waiting_limit
        self.work = NO_WORK
        """All that has been done."""
        self._runner = runner
        self._observe = observe
        self._waiting: deque[deque[GenerationJob]] = deque()  # by request
        self._running: list[GenerationJob] = []
        self._most = runner.settings.texts
        self._batch = runner.batch() if self._most > 1 else None
        self.passes = 0
        """Passes over the newest tokens of several texts, or of one, where there may be several."""
        self.rows = 0
        """Tokens that those took."""
        self._closing = False
        self._changed = threading.Condition()
        self._seen = runner.session.totals
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers in progress."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether an answer is in progress."""
        return bool(self._running)

    @property
    def policy_failed(self) -> bool:
        """Whether the policy has failed and LRU goes on."""
        return self._runner.session.policy_failure is not None

    @property
    def accepting(self) -> bool:
        """Whether a new job would be answered: the thread lives and is not closing."""
        return self._thread.is_alive() and not self._closing

    def submit(self, jobs: Sequence[GenerationJob]) -> None:
        """Queue the jobs of a request. Raises QueueFull when ``waiting_limit`` requests wait
        already."""
        with self._changed:
            if self._closing:
                for job in jobs:
                    job.tell(NotBegun())
                return
            # A job does not wait where the batch has room for one more.
            if len(self._waiting) - (self._most - len(self._running)) >= self.waiting_limit:
                raise QueueFull
            self._waiting.append(deque(jobs))
            self._changed.notify_all()

    def cancel(self, job: GenerationJob) -> None:
        """Cancel ``job``, whose client has gone. Harmless when the job has ended."""
        with self._changed:
            for jobs in self._waiting:
                if job in jobs:
                    jobs.remove(job)
                    if not jobs:
                        self._waiting.remove(jobs)
                    return
            if job in self._running and job.generation is not None:
                job.generation.cancel()

    def drain(self) -> None:
        """Begin no job; jobs that wait are refused, and the job in progress goes on."""
        with self._changed:
            self._closing = True
            for job in chain.from_iterable(self._waiting):
                job.tell(NotBegun())
            self._waiting.clear()
            self._changed.notify_all()

    def cancel_running(self) -> None:
        """Cancel the answers in progress."""
        with self._changed:
            for job in self._running:
                if job.generation is not None:
                    job.generation.cancel()

    def close(self) -> None:
        """Cut the answer in progress short and end the thread."""
        self.drain()
        self.cancel_running()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._batch is not None:
            self._run_batch(self._batch)
            return
        while (job := self._next(wait=True)) is not None:
            self._end(job, self._answer(job))

    def _run_batch(self, batch: Batch) -> None:
        """In turn: read the prompt of one job that waits, and decode a token of each that runs."""
        while True:
            job = self._next(wait=not batch.rows) if len(batch.rows) < self._most else None
            if job is not None:
                self._add(batch, job)
            elif not batch.rows:
                return  # nobody waits, and nobody will
            if batch.rows:
                self._step(batch)

    def _add(self, batch: Batch, job: GenerationJob) -> None:
        """Read a job's prompt. An error is this job's alone: the others go on."""
        generation = job.generation
        assert isinstance(generation, BatchedGeneration)
        try:
            if not batch.add(generation, *job.wanted):
                self._complete(job)
        except BaseException as error:  # a policy may raise anything; others must be served
            self._end(job, self._failed(job, error))

    def _step(self, batch: Batch) -> None:
        self.passes += 1
        self.rows += len(batch.rows)
        try:
            ended = batch.step()
        except BaseException as error:
            batch.clear()
            for job in list(self._running):
                self._end(job, self._failed(job, error))
            return
        for generation in ended:
            self._complete(next(job for job in self._running if job.generation is generation))

    def _complete(self, job: GenerationJob) -> None:
        assert job.generation is not None
        generated = job.generation.outcome()
        self._account(job, generated.ending)
        self._end(job, Completed(generated))

    def _end(self, job: GenerationJob, event: Completed | Failed) -> None:
        self._write_ended()
        with self._changed:
            self._running.remove(job)
        # Told last: whoever hears it may come again at once, and finds the worker free.
        job.tell(event)

    def _write_ended(self) -> None:
        """What is recorded of texts that have ended goes to disk. Where it cannot, answers go on
        without a recording."""
        if self._recording is None:
            return
        try:
            self._recording.write_ended()
        except (OSError, TraceError) as error:
            LOG.error("error: the recording is given up: %s", error)
            self._recording = None

    def _next(self, *, wait: bool) -> GenerationJob | None:
        """The job whose turn it is; None where there is none, and where none will be begun."""
        with self._changed:
            while wait and not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing or not self._waiting:
                return None
            jobs = self._waiting.popleft()
            job = jobs.popleft()
            if jobs:
                self._waiting.append(jobs)
            # Under the lock, so that whoever cancels finds it.
            job.begin(self._runner, batched=self._batch is not None)
            self._running.append(job)
            return job

    def _answer(self, job: GenerationJob) -> Completed | Failed:
        generation = job.generation
        assert generation is not None
        try:
            generated = generation.run(*job.wanted)
        except BaseException as error:  # a policy may raise anything; the next job must be served
            return self._failed(job, error)
        self._account(job, generated.ending)
        return Completed(generated)

    def _failed(self, job: GenerationJob, error: BaseException) -> Failed:
        expected = isinstance(error, (RunError, PolicyError, OSError))
        LOG.error("error: %s", error, exc_info=None if expected else error)
        self._account(job, "error")
        self._recover()
        return Failed(error)

    def _account(self, job: GenerationJob, ending: str) -> None:
        assert job.generation is not None
        # Copies that ended between two jobs belong to neither; here they are counted.
        totals = self._runner.session.totals
        outcome = job.generation.outcome()
        done = replace(outcome, totals=totals.since(self._seen))
        self._seen = totals
        self.work += done
        self._observe(Ended(done, ending, job.submitted_s, outcome.token_s))

    def _recover(self) -> None:
        """Make the session fit to serve again."""
        try:
            self._runner.kept.drop()
            self._runner.session.reset()
        except Exception:  # a policy that cannot be made; its next job will say so again
            return
        if self._runner.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        self._seen = self._runner.session.totals
