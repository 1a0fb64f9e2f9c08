"""Two processes that write the same output, from the same files, with the same cache folder.

Each ends well or with one line; what lies there then is whole, and a run after them ends with the
bytes of one that was alone.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stress.faults import how_it_ended
from stress.journal import Journaled
from stress.warm import Done, Request, Warm
from stress.works import SMALL, files_of, fresh_folder

JOURNAL = "pairs.jsonl"


@dataclass(frozen=True)
class Paired:
    """Two runs of a command, and what was wrong; ``codes`` are their exit codes."""

    work: str
    number: int
    codes: list[int]
    fault: str


class Pairs(Journaled[Paired]):
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Paired)
        self.seed = seed

    def run(self, count: int, *, minutes: float, names: tuple[str, ...] = ()) -> None:
        """Run pairs until ``count`` are on record, or the time is up."""
        until = time.monotonic() + 60 * minutes
        chosen = [name for name in names or SMALL if SMALL[name].outputs]
        with Warm(self.folder / "w0") as one, Warm(self.folder / "w1") as other:
            seconds: dict[str, float] = {}
            while len(self.outcomes) < count and time.monotonic() < until:
                name = chosen[len(self.outcomes) % len(chosen)]
                if name not in seconds:
                    seconds[name] = self._alone(name, one)
                paired = self._pair(name, len(self.outcomes), seconds[name], (one, other))
                self.outcomes.append(paired)
                with self.journal.open("a") as file:
                    file.write(json.dumps(asdict(paired)) + "\n")

    @property
    def faults(self) -> list[Paired]:
        """Pairs that got into each other's way."""
        return [paired for paired in self.outcomes if paired.fault]

    def rows(self) -> list[dict[str, str | int]]:
        """Pairs by command: how many of the two ended well."""
        found: list[dict[str, str | int]] = []
        for name in (*SMALL, "all"):
            of = [paired for paired in self.outcomes if name in (paired.work, "all")]
            if of:
                well = [p.codes.count(0) for p in of]
                found.append({"command": name, "pairs": len(of), "both": well.count(2),
                              "one": well.count(1),
                              "faults": sum(bool(p.fault) for p in of)})  # fmt: skip
        return found

    def _request(self, name: str, folder: Path) -> Request:
        work = SMALL[name]
        home = self.folder / "home"
        return Request(work.command, str(folder), env=work.env(folder, home))

    def _alone(self, name: str, warm: Warm) -> float:
        fresh, whole = fresh_folder(self.folder, name, SMALL[name]), self.folder / f"{name}.whole"
        for _ in range(2):  # the first fills caches, whose time does not count
            shutil.rmtree(whole, ignore_errors=True)
            shutil.copytree(fresh, whole)
            done = warm.run(self._request(name, whole))
            assert done.code == 0, f"{name}: {done.stderr}"
        return done.seconds

    def _pair(self, name: str, number: int, seconds: float, warm: tuple[Warm, Warm]) -> Paired:
        work, rng = SMALL[name], random.Random(f"{self.seed} {number}")
        folder, whole = self.folder / f"{name}-{number}", self.folder / f"{name}.whole"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / f"{name}.fresh", folder)
        before = set(files_of(folder))
        request, later_s = self._request(name, folder), rng.choice((0.0, rng.uniform(0, seconds)))

        def second() -> Done:
            time.sleep(later_s)
            return warm[1].run(request)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(second)
            both = [warm[0].run(request), running.result()]
        fault = next(filter(None, map(how_it_ended, both)), "")
        fault = fault or work.damage(folder, whole)
        if not fault and not work.is_there(folder):
            more = work.again if work.is_begun(folder) else ()
            done = warm[0].run(replace(request, command=(*work.command, *more)))
            fault = done.stderr[-1000:] if done.code else work.damage(folder, whole)
        left = [n for n in files_of(folder) if n not in before and not work.is_output(n)]
        if not fault and left and not left[0].startswith(f"{work.cache}/"):
            fault = f"left {left[0]}"
        if not fault:
            shutil.rmtree(folder)
        return Paired(name, number, [done.code for done in both], fault)
