"""Commands killed at random moments: what was finished is whole, and going on gives equal bytes.

Each work is run undisturbed, for its bytes and its time. Then it is killed at a random moment of
that time, again and again, and taken up each time, until a run ends. Its files must be those of
the undisturbed run, and nothing else may be left.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stress.journal import Journaled
from stress.warm import Request, Warm
from stress.works import LONG, SMALL, Work, files_of, fresh_folder

JOURNAL = "kills.jsonl"
WORKS = {
    **{name: work for name, work in SMALL.items() if work.outputs},
    **{f"{name}, long": work for name, work in LONG.items()},
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """One work that was killed ``kills`` times, and what was wrong; nothing: ``fault`` is empty."""

    work: str
    number: int
    kills: int
    fault: str


class Kills(Journaled[Ended]):
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Ended)
        self.seed = seed
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._alone = {name: threading.Lock() for name in WORKS}
        self._next = max((ended.number for ended in self.outcomes), default=-1) + 1

    def run(
        self, count: int, *, minutes: float, names: tuple[str, ...] = (), workers: int = 1
    ) -> None:
        """Kill until ``count`` kills are on record, or the time is up."""
        until = time.monotonic() + 60 * minutes
        # A small work's moments are all near a call on a file; a long one's are mostly between two.
        chosen = [*SMALL, *SMALL, *SMALL, *WORKS]
        chosen = [name for name in chosen if name in (names or WORKS)]
        crew = [Warm(self.folder / f"w{i}") for i in range(workers)]
        try:

            def work(warm: Warm) -> None:
                while self._killed() < count and time.monotonic() < until:
                    with self._lock:
                        number, self._next = self._next, self._next + 1
                    ended = self._one(chosen[number % len(chosen)], number, warm)
                    with self._lock, self.journal.open("a") as file:
                        self.outcomes.append(ended)
                        file.write(json.dumps(asdict(ended)) + "\n")

            with ThreadPoolExecutor(workers) as pool:
                for done in [pool.submit(work, warm) for warm in crew]:
                    done.result()
        finally:
            for warm in crew:
                warm.close()

    def _killed(self) -> int:
        return sum(ended.kills for ended in self.outcomes)

    @property
    def faults(self) -> list[Ended]:
        """Works that did not end as if undisturbed."""
        return [ended for ended in self.outcomes if ended.fault]

    def rows(self) -> list[dict[str, str | int]]:
        """Kills and faults by work."""
        found: list[dict[str, str | int]] = []
        for name in (*WORKS, "all"):
            of = [ended for ended in self.outcomes if name in (ended.work, "all")]
            if of:
                kills, faults = sum(e.kills for e in of), sum(bool(e.fault) for e in of)
                found.append({"work": name, "kills": kills, "works": len(of), "faults": faults})
        return found

    def _one(self, name: str, number: int, warm: Warm) -> Ended:
        self._undisturbed(name, warm)
        work, whole = WORKS[name], self.folder / f"{name}.whole"
        rng = random.Random(f"{self.seed} {number}")
        folder = self._fresh(f"{name}-{number}", name)
        before, fresh = set(files_of(folder)), self.folder / f"{name}.fresh"
        kills, done = 0, None
        for _ in range(rng.choice((1, 2, 3, 5))):
            request = self._request(work, folder)
            number_of = rng.choice(SIGNALS)
            after_s = rng.uniform(0.0, self._seconds[name])
            done = warm.run(replace(request, signal=int(number_of), after_s=after_s))
            finished = work.is_there(folder) and not work.damage(folder, whole)
            if done.code == 0 or (done.code == 1 and finished):
                break  # it was quicker this time, or had been and is refused now
            kills += 1
            fault = work.damage(folder, whole, fresh)
            if "Traceback" in done.stderr or done.code != -number_of:
                fault = f"exit code {done.code}: {done.stderr[-500:]}"
            if done.orphans:
                fault = "left processes behind"
            if fault:
                return Ended(name, number, kills, f"{number_of.name}, kill {kills}: {fault}")
        if done is None or done.code:
            done = warm.run(self._request(work, folder))
        fault = work.damage(folder, whole)
        if not work.is_there(folder):
            fault = f"going on ended with {done.code}: {done.stderr[-1000:]}"
        # Refused: what was killed had just finished, and only its tidying was still to do.
        if not fault and done.code == 0:
            fault = _left(work, folder, whole, before)
        if not fault:
            shutil.rmtree(folder)
        return Ended(name, number, kills, fault)

    def _undisturbed(self, name: str, warm: Warm) -> None:
        with self._alone[name]:
            while name not in self._seconds:
                folder = self._fresh(f"{name}.whole", name)
                again = (self.folder / f"{name}.warm").exists()
                done = warm.run(self._request(WORKS[name], folder))
                assert done.code == 0, f"{name}: {done.stderr}"
                if again:
                    self._seconds[name] = done.seconds
                else:  # the first run fills caches, whose time does not count
                    (self.folder / f"{name}.warm").touch()

    def _fresh(self, folder: str, name: str) -> Path:
        fresh = fresh_folder(self.folder, name, WORKS[name])
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        return Path(shutil.copytree(fresh, self.folder / folder))

    def _request(self, work: Work, folder: Path) -> Request:
        more = work.again if work.is_begun(folder) else ()
        env = work.env(folder, self.folder / "home")
        return Request((*work.command, *more), str(folder), env=env, patience_s=600.0,
                       orphans_s=work.orphans_s)  # fmt: skip


def _left(work: Work, folder: Path, whole: Path, before: set[str]) -> str:
    """What there is beside the outputs that an undisturbed run has not; "": nothing."""
    for name in files_of(folder):
        if name in before or work.is_output(name):
            continue
        if not (whole / name).exists():
            return f"left {name}"
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            return f"{name} has other bytes"
    return ""
