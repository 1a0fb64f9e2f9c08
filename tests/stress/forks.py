"""A piece of work in a forked child, with limits of its own: what it does to a process ends there.

The parent has imported what the child needs and has no threads, so a fork takes milliseconds where
a new Python takes seconds.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS_SPACE = 4 << 30  # more than a child begins with: a header that claims a petabyte gets none
CPU_S = 90
PATIENCE_S = 900.0  # other work may keep the machine busy

DIED, HUNG = "died", "hung"


@dataclass(frozen=True)
class Ended:
    """How a child ended: with ``value``, or ``how`` (DIED, HUNG) and what it said last."""

    value: Any = None
    how: str = ""
    told: str = ""


def forked(
    work: Callable[[], Any], output: Path, *, patience_s: float = PATIENCE_S, cpu_s: int = CPU_S
) -> Ended:
    """The value of ``work``, which JSON can hold, from a child whose stdout and stderr are in
    ``output``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(work, output, write, cpu_s)
    os.close(write)
    try:
        line = _line_from(read, patience_s)
    finally:
        os.close(read)
        how = _ended(pid, hung=line is None)
    if line:
        return Ended(json.loads(line))
    said = output.read_text(errors="replace")[-2000:]
    return Ended(None, HUNG if line is None or "SIGXCPU" in how else DIED, f"{how}: {said}")


def _child(work: Callable[[], Any], output: Path, write: int, cpu_s: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 (until the child ends)
        os.dup2(sys.stdin.fileno(), 0)
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        faulthandler.enable(2)
        most = address_space() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        answer = json.dumps(work()).encode() + b"\n"
        while answer:
            answer = answer[os.write(write, answer) :]
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _line_from(read: int, patience_s: float) -> bytes | None:
    """What the child answered: b"" if nothing, None if it has neither answered nor ended."""
    line, until = b"", time.monotonic() + patience_s
    while not line.endswith(b"\n"):
        if not select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        part = os.read(read, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def _ended(pid: int, *, hung: bool) -> str:
    """End the child and all that it has started; how it ended."""
    if hung:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)  # faulthandler then tells where it was
        time.sleep(1)
    else:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def address_space() -> int:
    """Bytes of address space that this process has."""
    return _status("VmSize")


def most_address_space() -> int:
    """The most that it had since it was forked."""
    return _status("VmPeak")


def resident() -> int:
    """Bytes of memory that this process has."""
    return _status("VmRSS")


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) << 10


def import_all(names: Iterable[str]) -> None:
    """Import modules that a child has imported, so that the next child has them."""
    for name in names:
        if name not in sys.modules:
            with suppress(BaseException):
                importlib.import_module(name)
