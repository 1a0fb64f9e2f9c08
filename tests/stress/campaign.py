"""Thousands of small jobs, on all cores, with a journal: what is done is not done again."""

from __future__ import annotations

import json
import os
import random
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from stress.forks import DIED, HUNG
from stress.outcomes import GOOD, Outcome

PATIENCE_S = 1800.0  # for a child, which has a limit of its own, and a case's right files
JOURNAL = "outcomes.jsonl"
AT_A_TIME = 30  # jobs of one case: the first of a process takes long


def jobs(
    count: int, seed: int, shares_of: Mapping[str, int], names: tuple[str, ...] = ()
) -> list[tuple[str, int]]:
    """``count`` jobs shared out over the cases by their shares; the cases in a random order."""
    chosen = {name: share for name, share in shares_of.items() if not names or name in names}
    shares = [name for name, share in chosen.items() for _ in range(share)]
    found = [(shares[i % len(shares)], i // len(shares)) for i in range(count)]
    numbered = Counter[str]()
    for i, (name, _) in enumerate(found):
        found[i] = (name, numbered[name])
        numbered[name] += 1
    order = list(chosen)
    random.Random(seed).shuffle(order)
    return sorted(found, key=lambda job: (order.index(job[0]), job[1]))


class Waiting:
    """The jobs that are to be done: a worker gets some of a case, then of another that nobody is
    at, if it can be of one that it has begun before."""

    def __init__(self, todo: list[tuple[str, int]]) -> None:
        self._left: dict[str, list[int]] = {}
        for case, number in todo[::-1]:
            self._left.setdefault(case, []).append(number)
        self._left = dict(reversed(self._left.items()))
        self._turns = Counter[str]()
        self._at: dict[object, str] = {}
        self._begun: dict[object, set[str]] = {}

    def next(self, worker: object) -> tuple[str, int] | None:
        """A job for ``worker``; None where nothing is left."""
        if not self._left:
            return None
        case = self._at.get(worker)
        if case not in self._left or not self._turns[case] % AT_A_TIME:
            case = self._another(worker)
        self._turns[case] += 1
        number = self._left[case].pop()
        if not self._left[case]:
            del self._left[case]
        return case, number

    def _another(self, worker: object) -> str:
        begun = self._begun.setdefault(worker, set())
        others = {case for who, case in self._at.items() if who is not worker}
        free = [case for case in self._left if case not in others] or [*self._left]
        case = min(free, key=lambda case: (self._turns[case] // AT_A_TIME, case not in begun))
        self._at[worker] = case
        begun.add(case)
        return case


class Campaign:
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int, kind: str = "files") -> None:
        """``kind`` is one of `stress.worker.KINDS`."""
        self.folder = folder
        self.seed = seed
        self.kind = kind
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = folder / f"{seed}-{JOURNAL}"
        self.outcomes = list(self._read())

    def _read(self) -> Iterator[Outcome]:
        if self.journal.exists():
            for line in self.journal.read_text().splitlines():
                yield Outcome(**json.loads(line))

    def run(self, todo: list[tuple[str, int]], *, workers: int, minutes: float) -> None:
        """Do what of ``todo`` is not done, until the time is up."""
        done = {(outcome.case, outcome.number) for outcome in self.outcomes}
        waiting = Waiting([job for job in todo if job not in done])
        until = time.monotonic() + 60 * minutes
        with selectors.DefaultSelector() as selector, self.journal.open("a") as journal:
            crew = [
                _Worker(self.folder / f"w{i}", (self.kind, str(self.seed)), selector)
                for i in range(workers)
            ]
            for worker in crew:
                worker.give(waiting)
            while any(worker.job for worker in crew):
                for outcome in _finished(crew, selector):
                    self.outcomes.append(outcome)
                    journal.write(json.dumps(vars(outcome)) + "\n")
                    journal.flush()
                for worker in crew:
                    if not worker.job and time.monotonic() < until:
                        worker.give(waiting)
            for worker in crew:
                worker.stop()

    @property
    def faults(self) -> list[Outcome]:
        """What neither was read nor refused in one line."""
        return [outcome for outcome in self.outcomes if outcome.outcome not in GOOD]

    def rows(self) -> list[dict[str, str | int]]:
        """Outcomes by case, and of all cases."""
        counted = Counter((outcome.case, outcome.outcome) for outcome in self.outcomes)
        found = {kind for _, kind in counted}
        kinds = [*(kind for kind in GOOD if kind in found), *sorted(found - set(GOOD))]
        rows: list[dict[str, str | int]] = [
            {"case": case, **{kind: counted[case, kind] for kind in kinds}}
            for case in dict.fromkeys(sorted(outcome.case for outcome in self.outcomes))
        ]
        totals = Counter(outcome.outcome for outcome in self.outcomes)
        return [*rows, {"case": "all", **{kind: totals[kind] for kind in kinds}}]


class _Worker:
    """A process that does one job at a time, and is replaced when it hangs or dies."""

    def __init__(
        self, folder: Path, what: tuple[str, str], selector: selectors.BaseSelector
    ) -> None:
        """``what``: the kind of jobs, and their seed."""
        self.folder = folder
        self.kind, self.seed = what
        self.selector = selector
        self.job: tuple[str, int] | None = None
        self.began = 0.0
        self.process: subprocess.Popen[str] | None = None

    def give(self, waiting: Waiting) -> None:
        job = waiting.next(self)
        if job is None:
            return
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        self.job = job
        self.began = time.monotonic()
        self.process.stdin.write(f"{self.job[0]} {self.job[1]}\n")
        self.process.stdin.flush()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stress.worker", self.kind, str(self.folder), self.seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr").open("w"),
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        assert self.process.stdout is not None
        self.selector.register(self.process.stdout, selectors.EVENT_READ, self)

    def answered(self) -> Outcome:
        """The answer that has come, or that the process is gone."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            self.job = None
            return Outcome(**json.loads(line))
        return self.lost(DIED)

    def lost(self, how: str) -> Outcome:
        """End the process; its job ended badly."""
        assert self.job is not None
        outcome = Outcome(*self.job, how, self.stop())
        self.job = None
        return outcome

    def stop(self) -> str:
        """End the process; returns what it last said on stderr."""
        if self.process is None:
            return ""
        assert self.process.stdout is not None
        self.selector.unregister(self.process.stdout)
        self.process.kill()
        self.process.communicate()
        code = self.process.returncode
        self.process = None
        return f"code {code}: {(self.folder / 'stderr').read_text()[-1000:]}"


def _finished(crew: list[_Worker], selector: selectors.BaseSelector) -> Iterator[Outcome]:
    for key, _ in selector.select(timeout=1.0):
        yield key.data.answered()
    for worker in crew:
        if worker.job and time.monotonic() - worker.began > PATIENCE_S:
            yield worker.lost(HUNG)
