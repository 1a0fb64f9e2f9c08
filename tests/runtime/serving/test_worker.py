"""The thread that generates: its queue, and what it survives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.generate import Work
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.serving.worker import (
    AnswerEvent,
    Completed,
    Failed,
    GenerationJob,
    GenerationWorker,
    NotBegun,
    Piece,
    QueueFull,
)
from moerun.settings import Settings
from moerun.store.pack import pack

PATIENCE_S = 60


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store: Path = tmp_path_factory.mktemp("worker") / "store"
    with Runner(pack(resolve("tiny"), store), Settings(find_policy("lru"), slots=4)) as made:
        yield made
    torch.set_num_threads(threads)


def nobody(work: Work, ending: str) -> None: ...


class Asked:
    """A job of four tokens and what it is told."""

    def __init__(self, runner: Runner) -> None:
        self.events: SimpleQueue[AnswerEvent] = SimpleQueue()
        ids = runner.encode("It was the best of times")
        self.job = GenerationJob(ids, Sampling(max_new_tokens=4), self.events.put)

    def last(self) -> AnswerEvent:
        while isinstance(event := self.events.get(timeout=PATIENCE_S), Piece):
            pass
        return event


class Gates:
    """Holds a generation at its first layer until it is let go, or spoils it."""

    def __init__(self, runner: Runner) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._observers = runner.session.gate_observers

    def __enter__(self) -> Gates:
        self._observers.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._observers.remove(self)

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.go.wait(PATIENCE_S)
        if self.error:
            raise self.error


@pytest.mark.parametrize("limit", [0, 2])
def test_no_more_wait_than_may(runner: Runner, limit: int) -> None:
    worker = GenerationWorker(runner, limit, nobody)
    with Gates(runner) as gates:
        accepted = [Asked(runner) for _ in range(1 + limit)]
        for asked in accepted:  # the first of them even before the thread has looked
            worker.submit(asked.job)
        worker.start()
        assert gates.reached.wait(PATIENCE_S)
        assert (worker.busy, worker.waiting) == (True, limit)
        with pytest.raises(QueueFull):
            worker.submit(Asked(runner).job)
        gates.go.set()
        assert all(isinstance(asked.last(), Completed) for asked in accepted)
    worker.close()


def test_a_job_that_nobody_waits_for_is_not_begun(runner: Runner) -> None:
    endings: list[str] = []

    def note(work: Work, ending: str) -> None:
        endings.append(ending)

    worker = GenerationWorker(runner, 2, note)
    worker.start()
    with Gates(runner) as gates:
        running, left, stays = (Asked(runner) for _ in range(3))
        for asked in (running, left, stays):
            worker.submit(asked.job)
        assert gates.reached.wait(PATIENCE_S)
        worker.cancel(left.job)
        worker.cancel(running.job)
        assert worker.waiting == 1
        gates.go.set()
        stopped = running.last()
        assert isinstance(stopped, Completed)
        assert (stopped.generated.ending, stopped.generated.new_tokens) == ("cancelled", 0)
        assert isinstance(stays.last(), Completed)
    worker.close()
    assert endings == ["cancelled", "length"]
    assert left.events.empty()


@pytest.mark.parametrize("error", [SystemExit("no more"), MemoryError("no more")])
def test_it_outlives_whatever_a_generation_raises(
    runner: Runner, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    worker = GenerationWorker(runner, 0, nobody)
    worker.start()
    with Gates(runner) as gates:
        gates.error = error
        gates.go.set()
        spoilt = Asked(runner)
        worker.submit(spoilt.job)
        failed = spoilt.last()
        assert isinstance(failed, Failed)
        assert failed.error is error
    assert "error: no more" in caplog.text
    assert "Traceback" in caplog.text
    after = Asked(runner)
    worker.submit(after.job)
    done = after.last()
    assert isinstance(done, Completed)
    assert done.generated.new_tokens == 4
    assert worker.work.new_tokens == 4
    worker.close()


def test_after_draining_everyone_is_refused(runner: Runner) -> None:
    worker = GenerationWorker(runner, 1, nobody)
    worker.start()
    with Gates(runner) as gates:
        running, waiting, late = (Asked(runner) for _ in range(3))
        worker.submit(running.job)
        assert gates.reached.wait(PATIENCE_S)
        worker.submit(waiting.job)
        accepting = [worker.accepting]
        worker.drain()
        worker.submit(late.job)
        assert [*accepting, worker.accepting] == [True, False]
        assert isinstance(waiting.last(), NotBegun)
        assert isinstance(late.last(), NotBegun)
        gates.go.set()
        assert isinstance(running.last(), Completed)
    worker.close()
