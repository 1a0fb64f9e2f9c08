"""Commands whose n-th call on a file fails, for every n: one line, nothing half-written, and the
command works when it is run again.

The calls of a command are counted once. Then each is made to fail, each time in a folder of its
own, in each of the ways in which calls of its kind fail.
"""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stress.journal import Journaled
from stress.warm import Done, Request, Warm, build_shim
from stress.works import SMALL, Work, files_of, fresh_folder

JOURNAL = "faults.jsonl"
SHORT, CUT, DIE = -1, -2, -3  # see shim.c
WAYS: dict[str, tuple[int, ...]] = {
    "open": (errno.EMFILE, errno.EIO, errno.EACCES),
    "create": (errno.ENOSPC, errno.EMFILE, errno.EROFS),
    "opendir": (errno.EMFILE, errno.EIO),
    "read": (errno.EIO, SHORT, CUT),
    "mmap": (errno.ENOMEM,),
    "write": (errno.ENOSPC, errno.EIO, SHORT),
    "fwrite": (errno.ENOSPC,),
    "sendfile": (errno.ENOSPC,),
    "copy": (errno.ENOSPC,),
    "truncate": (errno.ENOSPC, errno.EIO),
    "fallocate": (errno.ENOSPC,),
    "fsync": (errno.EIO,),
    "flock": (errno.ENOLCK,),
    "close": (errno.EIO,),
    "rename": (errno.EIO, errno.ENOSPC),
    "exchange": (errno.EIO,),
    "link": (errno.EMLINK,),
    "unlink": (errno.EIO,),
    "rmdir": (errno.EIO,),
    "mkdir": (errno.ENOSPC, errno.EROFS),
    "stat": (errno.EIO,),
    "fstat": (errno.EIO,),
}
REFUSED, BORNE = "refused", "borne"
GOOD = (REFUSED, BORNE)


@dataclass(frozen=True)
class Call:
    """The ``number``-th call of a command on a file, from 1."""

    number: int
    kind: str
    path: str


@dataclass(frozen=True)
class Failed:
    """What came of a call that failed with ``way``: refused in one line, borne, or a fault."""

    work: str
    number: int
    kind: str
    path: str
    way: str
    outcome: str
    told: str = ""


def way_name(way: int) -> str:
    """ENOSPC, or how much less a call did."""
    return {SHORT: "half", CUT: "nothing", DIE: "killed"}.get(way) or errno.errorcode[way]


class Faults(Journaled[Failed]):
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Failed)
        self.seed = seed
        self.calls: dict[str, list[Call]] = {}

    def run(
        self, count: int, *, minutes: float, names: tuple[str, ...] = (), workers: int = 1
    ) -> None:
        """Let calls fail until ``count`` did, every one did, or the time is up."""
        shim = build_shim(self.folder)
        if shim is None:
            raise SystemExit("error: no C compiler: the campaign needs one for its library")
        until = time.monotonic() + 60 * minutes
        crew = [Warm(self.folder / f"w{i}", shim) for i in range(workers)]
        try:
            for name in names or tuple(SMALL):
                self._whole(name, crew[0])
            jobs = iter(list(self._todo(names or tuple(SMALL)))[: count - len(self.outcomes)])

            def work(warm: Warm) -> None:
                for name, call, way in jobs_of(jobs, until):
                    self._keep(self._one(name, call, way, warm, self.folder / f"at-{id(warm)}"))

            with ThreadPoolExecutor(workers) as pool:
                for done in [pool.submit(work, warm) for warm in crew]:
                    done.result()
        finally:
            for warm in crew:
                warm.close()

    @property
    def faults(self) -> list[Failed]:
        """Calls whose failure was neither refused in one line nor borne."""
        return [failed for failed in self.outcomes if failed.outcome not in GOOD]

    def rows(self) -> list[dict[str, str | int]]:
        """Calls, failures and outcomes by command."""
        found: list[dict[str, str | int]] = []
        for name in (*SMALL, "all"):
            of = [failed for failed in self.outcomes if name in (failed.work, "all")]
            if of:
                kinds = Counter(failed.outcome for failed in of)
                bad = sum(n for kind, n in kinds.items() if kind not in GOOD)
                points = len({(failed.work, failed.number) for failed in of})
                found.append({"command": name, "calls": points, "failures": len(of),
                              **{kind: kinds[kind] for kind in GOOD}, "faults": bad})  # fmt: skip
        return found

    def _keep(self, failed: Failed) -> None:
        self.outcomes.append(failed)
        with self.journal.open("a") as file:
            file.write(json.dumps(asdict(failed)) + "\n")

    def _todo(self, names: tuple[str, ...]) -> Iterator[tuple[str, Call, int]]:
        """What is left to do, in a random order: of calls alike one each, then a second each."""
        done = {(failed.work, failed.number, failed.way) for failed in self.outcomes}
        todo = [
            (name, call, way)
            for name in names
            for call in self.calls[name]
            for way in WAYS.get(call.kind, ())
        ]
        random.Random(self.seed).shuffle(todo)
        alike = Counter[tuple[str, str, str, int]]()
        turns = []
        for name, call, way in todo:
            key = (name, call.kind, re.sub(r"\w{8}(?=\.partial)", "", call.path), way)
            turns.append(alike[key])
            alike[key] += 1
        for _, job in sorted(zip(turns, todo, strict=True), key=lambda each: each[0]):
            if (job[0], job[1].number, way_name(job[2])) not in done:
                yield job

    def _whole(self, name: str, warm: Warm) -> None:
        """Run a command undisturbed, twice: for its outputs, and for its calls."""
        work = SMALL[name]
        fresh, whole = fresh_folder(self.folder, name, work), self.folder / f"{name}.whole"
        log = self.folder / f"{name}.calls"
        for _ in range(0 if log.exists() else 2):  # the first fills caches
            shutil.rmtree(whole, ignore_errors=True)
            shutil.copytree(fresh, whole)
            done = warm.run(self._request(work, whole, log=f"{log}.new"))
            assert done.code == 0, f"{name}: {done.stderr}"
            assert work.is_there(whole), f"{name}: {work.outputs}"
        if not log.exists():
            Path(f"{log}.new").rename(log)
        self.calls[name] = list(read_calls(log))

    def _request(self, work: Work, folder: Path, **given: object) -> Request:
        env = work.env(folder, self.folder / "home")
        return Request(work.command, str(folder), env=env, **given)  # type: ignore[arg-type]

    def _one(self, name: str, call: Call, way: int, warm: Warm, folder: Path) -> Failed:
        work, whole = SMALL[name], self.folder / f"{name}.whole"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / f"{name}.fresh", folder)
        before = set(files_of(folder))
        done = warm.run(self._request(work, folder, fault=(call.number, way)))
        fresh = self.folder / f"{name}.fresh"
        fault = judge(work, folder, (whole, fresh if done.code else None), done, before, call)
        finished = work.outputs and work.is_there(folder) and not work.damage(folder, whole)
        if not fault and done.code and not finished:
            fault = self._again(work, folder, whole, warm)
        outcome = "fault" if fault else REFUSED if done.code else BORNE
        told = fault or (done.stderr.strip().splitlines() or [""])[-1]
        path = call.path.removeprefix(str(whole)).lstrip("/")
        return Failed(name, call.number, call.kind, path, way_name(way), outcome, told)

    def _again(self, work: Work, folder: Path, whole: Path, warm: Warm) -> str:
        """Run a command again that has failed; what is wrong then."""
        more = work.again if work.is_begun(folder) else ()
        done = warm.run(replace(self._request(work, folder), command=(*work.command, *more)))
        if done.code:
            return f"run again: {done.stderr[-1000:]}"
        wrong = work.damage(folder, whole) if work.is_there(folder) else "no output"
        return f"run again: {wrong}" if wrong else ""


def jobs_of(jobs: Iterator[tuple[str, Call, int]], until: float) -> Iterator[tuple[str, Call, int]]:
    """The jobs of an iterator that several threads share, until the time is up."""
    while time.monotonic() < until and (job := next(jobs, None)) is not None:
        yield job


def read_calls(log: Path) -> Iterator[Call]:
    """The calls of a log without data."""
    for line in log.read_text(errors="replace").splitlines():
        number, kind, _, _, path, other = line.split("\t")
        if int(number):
            yield Call(int(number), kind, other or path)


def judge(
    work: Work,
    folder: Path,
    whole: tuple[Path, Path | None],
    done: Done,
    before: set[str],
    call: Call,
) -> str:
    """What is wrong with how a command ended; "": nothing.

    ``whole`` has its right outputs, and those that it was to replace.
    """
    wrong = how_it_ended(done) or work.damage(folder, *whole)
    if wrong or not done.code:
        return wrong or ("" if work.is_there(folder) else f"no outputs: {done.stderr[-500:]}")
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    kept = (*work.keeps, *work.outputs)
    left = [n for n in files_of(folder) if n not in before and n.split("/")[0] not in kept]
    if left and call.kind not in ("unlink", "rmdir", "opendir"):
        return f"left {left[0]}: {error}"
    named = names_a_file(error, call, work) or folder.name in error
    # Of the folder it runs in, and where memory is what is missing, that is all there is to say.
    named = named or error.startswith(("error: .: ", "error: . ")) or "not enough memory" in error
    return "" if named else f"names no file ({call.path}): {error}"


def how_it_ended(done: Done) -> str:
    """What no command may do, whatever befalls it; "": it ended well, or in one line."""
    if done.hung or done.orphans:
        return "hangs" if done.hung else "left processes behind"
    if "Traceback" in done.stderr or "panicked" in done.stderr:
        return f"traceback: {done.stderr[-1500:]}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    clear = len(errors) == 1 and len(errors[0]) <= 600
    if done.code not in (0, 1) or (done.code and not clear):
        return f"exit code {done.code}, no one line: {done.stderr[-1000:]}"
    return ""


def names_a_file(line: str, call: Call, work: Work) -> bool:
    """Whether an error names what failed: the file, its folder, or the argument it is of."""
    path = Path(call.path)
    names = {path.name, path.parent.name, *work.outputs, *work.command[2:]}
    return any(name in line for name in names if len(name) > 2 and not name.startswith("--"))
