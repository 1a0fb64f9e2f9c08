"""A process that has imported everything once, and forks a child for each command it is to run.

Starting a command takes seconds of imports; a forked child begins where ``main`` begins. The parent
never runs a command and has one thread, so that a child's state is that of a fresh process. It
reads one JSON object a line on stdin, the fields of ``Request``, and answers with those of
``Done``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHIM = Path(__file__).with_name("shim.c")
PACKAGES = ("moeroute", "moepolicy", "moesim", "moerun", "moetrace")
MODELS = "transformers.models.mixtral.modeling_mixtral"
NO_FAULT = (0, 0)
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
PAGE = resource.getpagesize()
STARTS_THREADS = ("polars", "_polars_runtime")  # packages that do so where they are imported


@dataclass(frozen=True)
class Request:
    """A command to run in ``folder``, its program first.

    ``fault``   the number of the call below the folder that fails (0: none), and how: see shim.c
    ``log``     the file that is to have all calls, with the data of writes where ``with_data``
    ``signal``  sent to the process ``after_s`` seconds; 0: none
    ``resident``  whether the child begins with the pages that its parent has in memory
    ``limit_bytes``  of address space that the command may take beyond what the parent has; 0: none
    ``orphans_s``  what processes that the command started may take to end after it
    """

    command: tuple[str, ...]
    folder: str
    env: dict[str, str] = field(default_factory=dict)
    fault: tuple[int, int] = NO_FAULT
    log: str = ""
    with_data: bool = False
    signal: int = 0
    after_s: float = 0.0
    resident: bool = False
    limit_bytes: int = 0
    patience_s: float = 300.0
    orphans_s: float = 10.0


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus the signal; what it printed; its own peak.

    ``orphans`` says that processes which it had started outlived it by the request's ``orphans_s``,
    in whatever group or session.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    orphans: bool = False
    hung: bool = False


class Warm:
    """The process, from outside. ``shim`` is a library to load into it, or None."""

    def __init__(self, scratch: Path, shim: Path | None = None) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        preload = {"LD_PRELOAD": str(shim)} if shim else {}
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._stderr = scratch / "warm.stderr"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stress.warm", str(scratch.resolve()), str(shim or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr.open("w"),
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | one_thread | {"COLUMNS": "200"} | preload,
        )

    def run(self, request: Request) -> Done:
        """Run a command to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm process ended: {self._stderr.read_text()[-2000:]}")
        return Done(**json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_shim(folder: Path) -> Path | None:
    """The shim, compiled into ``folder``; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    library = folder.resolve() / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SHIM), "-ldl"],
        check=True,
    )
    return library


def main() -> None:
    """Answer requests until stdin ends."""
    scratch, shim = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    gc.collect()
    gc.freeze()  # or a child copies the memory of all that its collector looks at
    system = ctypes.CDLL(None)
    system.malloc_trim(0)  # or what imports have freed would be a child's to take, uncounted
    library = ctypes.CDLL(shim) if shim else None
    # What a command leaves behind becomes a child of this process, which then sees it.
    assert system.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    requests = os.fdopen(os.dup(0), "r")
    for line in iter(requests.readline, ""):
        described = json.loads(line)
        described["command"] = tuple(described["command"])
        answers.write(json.dumps(asdict(_serve(Request(**described), scratch, library))) + "\n")
        answers.flush()


def _import_everything() -> None:
    importlib.import_module(MODELS)
    importlib.import_module("hqq.core.quantize")
    for package in map(importlib.import_module, PACKAGES):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # of an extra that is not installed
                    importlib.import_module(found.name)


def _serve(request: Request, scratch: Path, library: Any) -> Done:
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would lose the other threads"
    outs = scratch / f"stdout-{os.getpid()}", scratch / f"stderr-{os.getpid()}"
    imported = scratch / f"imported-{os.getpid()}"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(request, outs, library, imported)
    pidfd = os.pidfd_open(child)
    hung = False
    if request.signal:
        select.select([pidfd], [], [], request.after_s)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, request.signal)
    if not select.select([pidfd], [], [], request.patience_s)[0]:
        hung = True
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - began
    if not request.resident:  # or its memory would no longer be what a fresh process takes
        _import_as(imported)
    return Done(
        code=os.waitstatus_to_exitcode(status),
        stdout=outs[0].read_text(errors="replace"),
        stderr=outs[1].read_text(errors="replace"),
        seconds=seconds,
        peak_bytes=used.ru_maxrss << 10,
        orphans=_orphans(request.orphans_s),
        hung=hung,
    )


def _import_as(names: Path) -> None:
    """Import what a child imported, so that the next one need not; a file lists it."""
    if not names.exists():  # it was killed
        return
    for name in names.read_text().splitlines():
        if name not in sys.modules and not name.startswith(STARTS_THREADS):
            with contextlib.suppress(Exception):  # what it made itself, such as a policy's file
                importlib.import_module(name)
    names.unlink()
    gc.freeze()


def _orphans(patience_s: float) -> bool:
    """Whether children of this process are left after a while; then ends them."""
    until = time.monotonic() + patience_s
    while _has_children():
        if time.monotonic() > until:
            while _has_children():  # those of a child that ends become children, too
                for child in Path("/proc/thread-self/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                time.sleep(0.02)
            return True
        time.sleep(0.02)
    return False


def _has_children() -> bool:
    """Whether this process has children that have not ended; takes note of those that have."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _become(request: Request, outs: tuple[Path, Path], library: Any, imported: Path) -> None:
    """Be the command; never returns. ``imported`` gets the names of the modules that it imports."""
    code, known = 70, set(sys.modules)
    try:
        os.setsid()
        os.chdir(request.folder)
        os.environ.update(request.env)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, out in zip((1, 2), outs, strict=True):
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(os.dup(1), "w")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        sys.modules["__main__"] = types.ModuleType("__main__")  # what spawned workers import
        sys.argv = list(request.command)
        if request.resident:
            _touch_pages_of(os.getppid())
        if request.limit_bytes:
            limit = request.limit_bytes + _address_space()
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if library is not None:
            log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) \
                if request.log else -1  # fmt: skip
            root = os.path.realpath(request.folder).encode()
            library.shim_arm(root, *request.fault, log, int(request.with_data))
        code = _main(request.command[0])
        if code == 0 and (more := sys.modules.keys() - known):
            imported.write_text("\n".join(name for name in sys.modules if name in more))
    finally:
        os._exit(code)


def _main(program: str) -> int:
    """The exit code of a program's ``main``, and what Python does at its end."""
    code = 0
    try:
        importlib.import_module(program if "." in program else f"{program}.cli").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for last in (
        threading._shutdown,  # type: ignore[attr-defined]
        atexit._run_exitfuncs,
        sys.stdout.flush,
    ):
        try:
            last()
        except BaseException:
            traceback.print_exc()
            code = 120
    return code


def _touch_pages_of(parent: int) -> None:
    """Have in memory what a parent has: a fork does not take over the pages of mapped files."""
    present = np.uint64(1 << 63)
    with Path(f"/proc/{parent}/pagemap").open("rb") as table:
        for line in Path("/proc/self/maps").read_text().splitlines():
            area, rights, _, _, inode, *_ = line.split()
            start, end = (int(part, 16) for part in area.split("-"))
            if inode == "0" or not rights.startswith("r"):
                continue
            table.seek(start // PAGE * 8)
            pages = np.frombuffer(table.read((end - start) // PAGE * 8), np.uint64)
            for page in np.flatnonzero(pages & present).tolist():
                ctypes.string_at(start + page * PAGE, 1)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * PAGE


if __name__ == "__main__":
    main()
