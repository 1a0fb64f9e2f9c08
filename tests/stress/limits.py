"""Commands that reach the limit of their memory, anywhere on their way.

The limit (RLIMIT_AS) is drawn between nothing more than the libraries take and what the command
needs. A command ends well, or with one line and nothing half-written, and works without the limit.
A library that ends the process itself (Rust aborts where there is no memory) is counted apart.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stress.faults import how_it_ended
from stress.journal import Journaled
from stress.warm import Done, Request, Warm
from stress.works import SMALL, fresh_folder

JOURNAL = "limits.jsonl"
MIB = 1 << 20
ENOUGH = 4096 * MIB
ABORTED = "aborted"
GLIBC_GIVES_UP = 127  # it has no memory for thread-local data


@dataclass(frozen=True)
class Limited:
    """A command under a limit: well, refused, aborted by a library, or a fault."""

    work: str
    number: int
    limit_mib: int
    outcome: str
    told: str


class Limits(Journaled[Limited]):
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Limited)
        self.seed = seed
        self._needs: dict[str, int] = {}

    def run(self, count: int, *, minutes: float, names: tuple[str, ...] = ()) -> None:
        """Run commands under limits until ``count`` are on record, or the time is up."""
        until = time.monotonic() + 60 * minutes
        chosen = names or tuple(SMALL)
        with Warm(self.folder / "w0") as warm:
            while len(self.outcomes) < count and time.monotonic() < until:
                number = len(self.outcomes)
                limited = self._one(chosen[number % len(chosen)], number, warm)
                self.outcomes.append(limited)
                with self.journal.open("a") as file:
                    file.write(json.dumps(asdict(limited)) + "\n")

    @property
    def faults(self) -> list[Limited]:
        """Commands that ended in another way."""
        return [each for each in self.outcomes if each.outcome == "fault"]

    def rows(self) -> list[dict[str, str | int]]:
        """Outcomes by command."""
        kinds = ("well", "refused", ABORTED, "fault")
        found: list[dict[str, str | int]] = []
        for name in (*SMALL, "all"):
            of = [each for each in self.outcomes if name in (each.work, "all")]
            if of:
                counts = {kind: sum(e.outcome == kind for e in of) for kind in kinds}
                found.append({"command": name, **counts})
        return found

    def _run(self, name: str, folder: Path, warm: Warm, limit_bytes: int) -> Done:
        work = SMALL[name]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh_folder(self.folder, name, work), folder)
        env = work.env(folder, self.folder / "home")
        return warm.run(Request(work.command, str(folder), env=env, limit_bytes=limit_bytes))

    def _need(self, name: str, warm: Warm) -> int:
        """The least limit, of doublings of a MiB, under which a command ends well."""
        if name not in self._needs:
            limit, whole = ENOUGH, self.folder / f"{name}.whole"
            assert self._run(name, whole, warm, 0).code == 0
            while limit > MIB and not self._run(name, self.folder / "at", warm, limit // 2).code:
                limit //= 2
            self._needs[name] = limit
        return self._needs[name]

    def _one(self, name: str, number: int, warm: Warm) -> Limited:
        work, whole, folder = SMALL[name], self.folder / f"{name}.whole", self.folder / "at"
        limit = random.Random(f"{self.seed} {number}").randrange(
            1, self._need(name, warm) // MIB + 1
        )
        done = self._run(name, folder, warm, limit * MIB)
        aborted = done.code in (-signal.SIGABRT, -signal.SIGSEGV, GLIBC_GIVES_UP)
        fault = "" if aborted else how_it_ended(done)
        fault = fault or work.damage(folder, whole, self.folder / f"{name}.fresh")
        if not fault and done.code and not (work.outputs and work.is_there(folder)):
            more = work.again if work.is_begun(folder) else ()
            env = work.env(folder, self.folder / "home")
            again = warm.run(replace(Request(work.command, str(folder), env=env),
                                     command=(*work.command, *more)))  # fmt: skip
            fault = again.stderr[-500:] if again.code else work.damage(folder, whole)
            fault = fault and f"run again: {fault}"
        well = "well" if done.code == 0 else "refused"
        outcome = "fault" if fault else ABORTED if aborted else well
        told = fault or (done.stderr.strip().splitlines() or [""])[-1][:300]
        return Limited(name, number, limit, outcome, told)
