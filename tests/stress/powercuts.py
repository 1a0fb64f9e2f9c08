"""Power cuts: what the disk has when it forgets what was not synced, at every call of a command.

A command runs once under the shim, which notes every call below its folder with the data of writes.
Replaying the calls up to any one of them gives what a power cut there would leave:

ordered  names as they were given, contents as they were last synced (what journaling file systems
         promise of metadata)
strict   names, too, only as their folder was last synced (what POSIX promises)

What is found then must be the old outputs, none, or the whole new ones; after the command's end it
must be the new ones; and the command, run again, ends with their bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from stress.faults import how_it_ended
from stress.journal import Journaled
from stress.warm import Request, Warm, build_shim
from stress.works import SMALL, Work, fresh_folder

JOURNAL = "powercuts.jsonl"
ORDERED, STRICT = "ordered", "strict"
CHANGES = ("opened", "write", "sendfile", "truncate", "fsync", "rename", "exchange", "link",
           "unlink", "rmdir", "mkdir")  # fmt: skip


class Logged(NamedTuple):
    """A call of the log: see shim.c."""

    number: int
    kind: str
    at: int
    n_bytes: int
    path: str
    other: str
    data: bytes


@dataclass(eq=False)
class File:
    """A file as the process sees it, and as the disk has it."""

    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    """A folder, likewise."""

    content: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """A folder's files, by replaying calls on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = _read(root)

    def apply(self, call: Logged) -> None:
        """Do a call that succeeded."""
        if call.kind in ("opened", "mkdir") and self._changes_nothing(call):
            return
        if call.kind == "opened":
            if call.at >= 0:
                self._opened(call)
        elif call.kind in ("write", "sendfile"):
            file = self._file(call.path)
            file.content[len(file.content) :] = bytes(max(call.at - len(file.content), 0))
            file.content[call.at : call.at + len(call.data)] = call.data
        elif call.kind == "truncate":
            file = self._file(call.path)
            del file.content[call.at :]
            file.content.extend(bytes(call.at - len(file.content)))
        elif call.kind == "fsync":
            self._sync(self._find(call.path))
        else:
            self._name(call)

    def leave(self, folder: Path, model: str) -> None:
        """Write what the disk has after a power cut."""
        _write(self.tree, folder, strict=model == STRICT)

    def _changes_nothing(self, call: Logged) -> bool:
        """Whether it is of the folder itself, or failed as a folder's making does in a folder that
        is still to be made."""
        return call.path == str(self.root) or self._find(str(Path(call.path).parent)) is None

    def _opened(self, call: Logged) -> None:
        folder, name = self._place(call.path)
        flags = call.n_bytes
        if name not in folder.content and flags & os.O_CREAT:
            folder.content[name] = File()
        elif name not in folder.content and name.endswith(".safetensors"):
            # The safetensors library renames by a system call of its own, which the shim misses.
            folder.content[name] = folder.content.pop([*folder.content][-1])
        elif name not in folder.content:
            folder.content[name] = Folder()  # made by a worker process: a sweep's scratch
        node = folder.content.get(name)
        if isinstance(node, File) and flags & os.O_TRUNC:
            node.content.clear()

    def _name(self, call: Logged) -> None:
        folder, name = self._place(call.path)
        if call.kind == "mkdir":
            folder.content.setdefault(name, Folder())
        elif call.kind in ("unlink", "rmdir"):
            node = folder.content.get(name)
            if not (isinstance(node, Folder) and node.content):  # or the call failed
                folder.content.pop(name, None)
        else:
            into, as_name = self._place(call.other)
            node = folder.content[name]
            if call.kind == "exchange":
                folder.content[name] = into.content[as_name]
            elif call.kind == "rename":
                del folder.content[name]
            into.content[as_name] = node

    def _sync(self, node: File | Folder | None) -> None:
        if isinstance(node, File):
            node.synced = bytes(node.content)
        elif node is not None:
            node.synced = dict(node.content)

    def _place(self, path: str) -> tuple[Folder, str]:
        parent = self._find(str(Path(path).parent))
        assert isinstance(parent, Folder)
        return parent, Path(path).name

    def _find(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self.tree
        for part in Path(path).relative_to(self.root).parts:
            if not isinstance(node, Folder):
                return None
            node = node.content.get(part)
        return node

    def _file(self, path: str) -> File:
        file = self._find(path)
        assert isinstance(file, File)
        return file


def _read(path: Path) -> Folder:
    found = Folder()
    for each in path.iterdir():
        if each.is_dir():
            found.content[each.name] = _read(each)
        else:
            data = each.read_bytes()
            found.content[each.name] = File(bytearray(data), data)
    found.synced = dict(found.content)
    return found


def _write(folder: Folder, path: Path, *, strict: bool) -> None:
    path.mkdir()
    for name, node in (folder.synced if strict else folder.content).items():
        if isinstance(node, Folder):
            _write(node, path / name, strict=strict)
        else:
            (path / name).write_bytes(node.synced)


def read_log(log: Path) -> Iterator[Logged]:
    """The calls of a log with data."""
    with log.open("rb") as file:
        for line in file:
            number, kind, at, n_bytes, path, other = line.decode().rstrip("\n").split("\t")
            data = file.read(int(n_bytes)) if kind in ("write", "sendfile") else b""
            yield Logged(int(number), kind, int(at), int(n_bytes), path, other, data)


@dataclass(frozen=True)
class Cut:
    """A power cut after call ``number`` of a command; ``resumed``: it was run again after it."""

    work: str
    number: int
    model: str
    resumed: bool
    fault: str


class PowerCuts(Journaled[Cut]):
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Cut)
        self.seed = seed
        self._lock = threading.Lock()

    def run(
        self, count: int, *, minutes: float, names: tuple[str, ...] = (), workers: int = 1
    ) -> None:
        """Look at every cut, and run ``count`` of them on, as far as the time goes."""
        shim = build_shim(self.folder)
        if shim is None:
            raise SystemExit("error: no C compiler: the campaign needs one for its library")
        until = time.monotonic() + 60 * minutes
        crew = [Warm(self.folder / f"w{i}", shim) for i in range(workers)]
        writers = [name for name in names or SMALL if SMALL[name].outputs]
        try:
            found = [cut for name in writers for cut in self._look(name, crew[0])]
            random.Random(self.seed).shuffle(found)
            todo = iter(found[: count - sum(cut.resumed for cut in self.outcomes)])

            def work(warm: Warm) -> None:
                while time.monotonic() < until and (cut := next(todo, None)) is not None:
                    self._go_on(cut, warm)

            with ThreadPoolExecutor(workers) as pool:
                for done in [pool.submit(work, warm) for warm in crew]:
                    done.result()
        finally:
            for warm in crew:
                warm.close()

    @property
    def faults(self) -> list[Cut]:
        """Cuts after which something was lost or half there."""
        return [cut for cut in self.outcomes if cut.fault]

    def rows(self) -> list[dict[str, str | int]]:
        """Cuts by command."""
        found: list[dict[str, str | int]] = []
        for name in (*SMALL, "all"):
            of = [cut for cut in self.outcomes if name in (cut.work, "all")]
            if of:
                found.append({"command": name, "cuts": sum(not c.resumed for c in of),
                              "run again": sum(c.resumed for c in of),
                              "faults": sum(bool(c.fault) for c in of)})  # fmt: skip
        return found

    def _look(self, name: str, warm: Warm) -> list[tuple[str, int, str]]:
        """Look at what every cut leaves; those to run on."""
        work, whole = SMALL[name], self.folder / f"{name}.whole"
        fresh, log = fresh_folder(self.folder, name, work), self.folder / f"{name}.log"
        if not log.exists():
            for _ in range(2):  # the first fills caches
                shutil.rmtree(whole, ignore_errors=True)
                shutil.copytree(fresh, whole)
                env = work.env(whole, self.folder / "home")
                done = warm.run(Request(work.command, str(whole), env=env, log=f"{log}.new",
                                        with_data=True))  # fmt: skip
                assert done.code == 0, f"{name}: {done.stderr}"
            Path(f"{log}.new").rename(log)
        seen = {(cut.number, cut.model) for cut in self.outcomes if cut.work == name}
        todo, number = [], 0
        disk = Disk(whole)
        disk.tree = _read(fresh)
        calls = list(read_log(log))
        last = max(call.number for call in calls)
        for call in calls:
            number = call.number or number
            if call.kind not in CHANGES:
                continue
            disk.apply(call)
            for model in (ORDERED, STRICT):
                todo.append((name, number, model))
                if (number, model) not in seen:
                    fault = self._left(disk, work, name, model, ended=number == last)
                    self._keep(Cut(name, number, model, False, fault))
        for model in (ORDERED, STRICT):
            if (last, model) not in seen:
                fault = self._left(disk, work, name, model, ended=True)
                self._keep(Cut(name, last, model, False, fault))
        return todo

    def _left(self, disk: Disk, work: Work, name: str, model: str, *, ended: bool) -> str:
        folder = self.folder / "left"
        shutil.rmtree(folder, ignore_errors=True)
        disk.leave(folder, model)
        before = None if ended else self.folder / f"{name}.fresh"
        fault = work.damage(folder, self.folder / f"{name}.whole", before)
        return fault or ("" if not ended or work.is_there(folder) else "lost after its end")

    def _go_on(self, cut: tuple[str, int, str], warm: Warm) -> None:
        name, number, model = cut
        work, whole = SMALL[name], self.folder / f"{name}.whole"
        disk = Disk(whole)
        disk.tree = _read(self.folder / f"{name}.fresh")
        for call in read_log(self.folder / f"{name}.log"):
            if call.number > number:
                break
            if call.kind in CHANGES:
                disk.apply(call)
        folder = self.folder / f"on-{id(warm)}"
        shutil.rmtree(folder, ignore_errors=True)
        disk.leave(folder, model)
        fault = ""
        if not work.is_there(folder) or work.damage(folder, whole):
            more = work.again if work.is_begun(folder) else ()
            if any((folder / out).exists() for out in work.outputs[:-1]):
                more = ("--force",)  # one of two outputs is whole, which is refused otherwise
            env = work.env(folder, self.folder / "home")
            done = warm.run(Request((*work.command, *more), str(folder), env=env))
            fault = how_it_ended(done) or (done.stderr[-1000:] if done.code else "")
            fault = fault or work.damage(folder, whole)
            fault = fault or ("" if work.is_there(folder) else "no output")
        self._keep(Cut(name, number, model, True, fault and f"run again: {fault}"))

    def _keep(self, cut: Cut) -> None:
        with self._lock, self.journal.open("a") as file:
            self.outcomes.append(cut)
            file.write(json.dumps(asdict(cut)) + "\n")
