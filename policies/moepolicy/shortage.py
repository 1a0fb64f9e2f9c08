"""Lack of memory: how libraries tell it, and whether a limit leaves what one of them needs.

Where a limit of the address space (``ulimit -v``, RLIMIT_AS) leaves too little, polars goes on
without its compiled part (``name 'PySeries' is not defined``), ends the process, or waits for
threads for ever. So a command asks before polars is imported.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MIB = 1 << 20
POLARS_BYTES = 1152 * MIB
"""polars 2.1 on Linux x86-64 reserved 1,013 MiB for a small table with 2 threads."""
POLARS_THREAD_BYTES = 24 * MIB
"""It reserved 1,212 MiB with 4 threads, 1,293 with 16 and 1,389 with 32."""
HARDLY_ANY_BYTES = 64 * MIB
"""An error that ends a command where this little is left comes of it: the lack shows as anything,
SyntaxError and "error return without exception set" among them."""
BALLAST_BYTES = 8 * MIB
"""What a command under a limit keeps of it, to tell its error with."""

_SAYINGS = (
    "can't allocate memory",  # torch
    "cannot allocate memory",  # the system
    "can't start new thread",  # threading
    "failed to map segment",  # the linker
    "spawn threads",  # Rust: rayon
    "spawn worker thread",  # Rust: tokio
    "bad_alloc",  # C++
)
_BALLAST: list[mmap.mmap] = []


def told_of(error: BaseException) -> str | None:
    """What to say of an error that a lack of memory is the cause of; None of another.

    Its causes count: libraries raise errors of their own over a MemoryError or the linker's.
    """
    for seen in _causes(error):
        lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
        telling = [line for line in lines if any(saying in line.lower() for saying in _SAYINGS)]
        if isinstance(seen, MemoryError):
            telling = telling or lines[:1]
        if telling or isinstance(seen, MemoryError):
            return ": ".join(["there is not enough memory", *telling[:1]])
    if remark():
        what = ": ".join((type(error).__name__, *str(error).splitlines()[:1]))
        return f"{what}{remark()}"
    return None


def remark() -> str:
    """What ends the line of an error that may well come of a lack of memory; "" where enough is
    left."""
    left = left_bytes()
    if left is None or left >= HARDLY_ANY_BYTES:
        return ""
    return f" (there is not enough memory: {leaves(left)})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised over; once each, if they are a ring."""
    known: set[int] = set()
    seen: BaseException | None = error
    while seen is not None and id(seen) not in known:
        known.add(id(seen))
        yield seen
        seen = seen.__cause__ or seen.__context__


def leaves(n_bytes: int) -> str:
    """What a limit leaves, in words."""
    return f"the limit (ulimit -v) leaves {max(n_bytes, 0) // MIB:,} MiB"


def left_bytes() -> int | None:
    """What the limit of the address space leaves this process; None: there is no limit, or it
    cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux
        return None
    return limit - pages * resource.getpagesize()


def polars_needs_bytes() -> int:
    """The address space that polars takes when it is imported and reads a small table."""
    threads = os.environ.get("POLARS_MAX_THREADS", "")
    n_threads = int(threads) if threads.isdecimal() else os.cpu_count() or 1
    return POLARS_BYTES + n_threads * POLARS_THREAD_BYTES


class RoomForPolars(MetaPathFinder):
    """Finds no module, but raises MemoryError where polars is to be imported without the room."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None: the next finder looks."""
        if name == "polars" and (left := left_bytes()) is not None:
            needed = polars_needs_bytes()
            if left < needed:
                raise MemoryError(
                    f"polars needs {needed // MIB:,} MiB of address space, and {leaves(left)}"
                )
        return None


def prepare() -> None:
    """Refuse from now on to import polars where the limit leaves too little for it. Under a limit,
    keep what `relieve` gives back, and leave out what Python says of errors it ignores for want of
    memory."""
    if not any(isinstance(finder, RoomForPolars) for finder in sys.meta_path):
        sys.meta_path.insert(0, RoomForPolars())
    if left_bytes() is not None and not _BALLAST:
        _BALLAST.append(mmap.mmap(-1, BALLAST_BYTES))
        sys.unraisablehook = _ignored


def _ignored(unraisable: sys.UnraisableHookArgs) -> None:
    """Python's lines about an error that nothing can catch, but where memory lacks: they would
    stand before the one line, and end in their middle."""
    relieve()
    if not remark():
        sys.__unraisablehook__(unraisable)


def relieve() -> None:
    """Give back what `prepare` has kept: the command ends, and has an error to tell."""
    while _BALLAST:
        _BALLAST.pop().close()
