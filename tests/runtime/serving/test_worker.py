"""The thread that generates: its queue, and what it survives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.serving.worker import (
    AnswerEvent,
    Completed,
    Ended,
    Failed,
    GenerationJob,
    GenerationWorker,
    NotBegun,
    Piece,
    QueueFull,
    Wanted,
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


def nobody(ended: Ended) -> None: ...


class Asked:
    """A job of four tokens and what it is told."""

    def __init__(self, runner: Runner) -> None:
        self.events: SimpleQueue[AnswerEvent] = SimpleQueue()
        ids = runner.encode("It was the best of times")
        self.job = GenerationJob(Wanted(ids, Sampling(max_new_tokens=4)), self.events.put)

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
            worker.submit([asked.job])
        worker.start()
        assert gates.reached.wait(PATIENCE_S)
        assert (worker.busy, worker.waiting) == (True, limit)
        with pytest.raises(QueueFull):
            worker.submit([Asked(runner).job])
        gates.go.set()
        assert all(isinstance(asked.last(), Completed) for asked in accepted)
    worker.close()


def test_a_job_that_nobody_waits_for_is_not_begun(runner: Runner) -> None:
    endings: list[str] = []

    def note(ended: Ended) -> None:
        endings.append(ended.ending)

    worker = GenerationWorker(runner, 2, note)
    worker.start()
    with Gates(runner) as gates:
        running, left, stays = (Asked(runner) for _ in range(3))
        for asked in (running, left, stays):
            worker.submit([asked.job])
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
        worker.submit([spoilt.job])
        failed = spoilt.last()
        assert isinstance(failed, Failed)
        assert failed.error is error
    assert "error: no more" in caplog.text
    assert "Traceback" in caplog.text
    after = Asked(runner)
    worker.submit([after.job])
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
        worker.submit([running.job])
        assert gates.reached.wait(PATIENCE_S)
        worker.submit([waiting.job])
        accepting = [worker.accepting]
        worker.drain()
        worker.submit([late.job])
        assert [*accepting, worker.accepting] == [True, False]
        assert isinstance(waiting.last(), NotBegun)
        assert isinstance(late.last(), NotBegun)
        gates.go.set()
        assert isinstance(running.last(), Completed)
    worker.close()


def test_requests_take_turns_a_job_at_a_time(runner: Runner) -> None:
    order: list[int] = []
    worker = GenerationWorker(runner, 3, nobody)
    with Gates(runner) as gates:
        first = [Asked(runner)]
        many = [Asked(runner) for _ in range(3)]
        last = [Asked(runner)]
        for number, asked in enumerate([*first, *many, *last]):
            tell = asked.job.tell

            def noted(event: AnswerEvent, number: int = number, tell: Any = tell) -> None:
                if isinstance(event, Completed):
                    order.append(number)
                tell(event)

            asked.job.tell = noted
        for request in (first, many, last):
            worker.submit([asked.job for asked in request])
        worker.start()
        assert gates.reached.wait(PATIENCE_S)
        assert worker.waiting == 2
        gates.go.set()
        for asked in (*first, *many, *last):
            assert isinstance(asked.last(), Completed)
    worker.close()
    assert order == [0, 1, 4, 2, 3]


@pytest.fixture(scope="module")
def several(runner: Runner) -> Iterator[Runner]:
    """The same model, for three texts at a time."""
    settings = Settings(find_policy("lru"), slots=4, texts=3)
    with Runner(runner.store, settings) as made:
        yield made


def test_several_are_answered_together(several: Runner) -> None:
    endings: list[str] = []
    worker = GenerationWorker(several, 1, lambda ended: endings.append(ended.ending))
    with Gates(several) as gates:
        asked = [Asked(several) for _ in range(5)]
        for each in asked[:4]:  # three at once, and one that waits
            worker.submit([each.job])
        with pytest.raises(QueueFull):
            worker.submit([asked[4].job])
        worker.start()
        assert gates.reached.wait(PATIENCE_S)
        worker.cancel(asked[1].job)
        gates.go.set()
        events = [asked[i].last() for i in (0, 2, 3)]
    worker.close()
    found = [event.generated.token_ids for event in events if isinstance(event, Completed)]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert worker.rows > worker.passes > 0  # a pass took tokens of several
    assert (worker.running, endings) == (0, ["length"] * 3)


def test_an_error_in_a_pass_is_everybodys_and_in_a_prompt_one_jobs(several: Runner) -> None:
    worker = GenerationWorker(several, 8, nobody)
    first, second = Asked(several), Asked(several)
    passes = 0

    def spoil(_layer: int, gate: Any) -> None:
        nonlocal passes
        passes += len(gate.ids) == 2  # a token of each of two texts
        if passes == 9:
            passes = 10
            raise MemoryError("no more")

    several.session.gate_observers.append(spoil)
    for asked in (first, second):
        worker.submit([asked.job])
    worker.start()
    for asked in (first, second):
        failed = asked.last()
        assert isinstance(failed, Failed)
        assert str(failed.error) == "no more"
    several.session.gate_observers.remove(spoil)
    long = Asked(several)
    long.job.wanted = Wanted(torch.ones(1, 600, dtype=torch.long), Sampling())
    good = Asked(several)
    for asked in (good, long):
        worker.submit([asked.job])
    assert isinstance(long.last(), Failed)
    assert isinstance(good.last(), Completed)
    worker.close()
