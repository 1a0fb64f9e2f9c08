"""Compiled code kept on disk from run to run, under its fingerprint, so that it is never stale."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from moepolicy.numba_internals import keep_in
from moepolicy.outputs import drop_tree

LOCKED_S = 120.0  # for code that another process compiles
KEPT = 256  # pieces of code: the hooks of a policy are one, and so is an engine

_tell: list[Callable[[str], None]] = []
_temporary: list[Path] = []  # the folder that cannot be written, where there is another one


def tell_of_compiling(tell: Callable[[str], None]) -> None:
    """Have ``tell`` say once what takes so long, when code is compiled that serves every policy."""
    _tell[:] = [tell]


def is_kept(name: str) -> bool:
    """Whether code of this name lies on disk."""
    return (code_folder() / f"{_file_of(name)}.nbi").is_file()


def keep(dispatcher: Any, name: str, *, tell: bool = False) -> None:
    """Have numba's ``dispatcher`` look for its code on disk before it compiles it, and leave it
    there under ``name``. Where that cannot be read or written, code is compiled each time.

    ``tell``: compiling it takes seconds, which `tell_of_compiling` is about, and of processes that
    want it at the same time one does it.
    """
    turn = _Turn(f"{_file_of(name)}.lock")

    def compiling() -> bool:
        _compiling()
        return turn.take()

    def saved() -> None:
        turn.give()
        _drop_least_recent()

    def used() -> None:
        os.utime(code_folder() / f"{_file_of(name)}.nbi")

    keep_in(code_folder, _file_of(name), dispatcher, used, saved, compiling if tell else None)


class _Turn:
    """A lock on a file beside the code, which the system opens when its holder dies."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._file: IO[bytes] | None = None

    def take(self) -> bool:
        """Wait for whoever holds it, LOCKED_S at most. Returns whether there was anybody."""
        try:
            import fcntl  # not everywhere

            file = (code_folder() / self._name).open("ab")
        except (ImportError, OSError):
            return False
        ends = time.monotonic() + LOCKED_S
        waited = False
        while time.monotonic() < ends:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
                return waited
            except OSError:
                waited = True
                time.sleep(0.02)
        file.close()
        return waited

    def give(self) -> None:
        """Let go of it, if it is held."""
        if self._file is not None:
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _file_of(name: str) -> str:
    """Code is pickled with functions of Python's, which another Python cannot read."""
    return f"{name}.{sys.implementation.cache_tag}"


def code_folder() -> Path:
    """Where code is kept."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    return Path(chosen) if chosen else home / "moepolicy" / "compiled"


def share_code() -> None:
    """Have code that this process and those it starts compile be kept for each other: where the
    folder cannot be written, in a temporary one, as long as this process lives."""
    folder = code_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError:
        _temporary.append(folder)
        own = tempfile.mkdtemp(prefix="moepolicy-")
        os.environ["NUMBA_CACHE_DIR"] = own
        atexit.register(drop_tree, own)


def _compiling() -> None:
    if not _temporary:
        share_code()
    kept = f"once; kept for later runs in {code_folder()}"
    if _temporary:
        kept = f"each time, for {_temporary[0]} cannot be written: set NUMBA_CACHE_DIR"
    while _tell:
        _tell.pop()(f"compiling the simulator for this machine, 10 to 30 s, {kept}")


def _drop_least_recent() -> None:
    """Keep the pieces of code that were used last: an engine is written once and used by all."""
    indices = [(path.stat().st_mtime_ns, path) for path in code_folder().glob("*.nbi")]
    for _, index in sorted(indices, reverse=True)[KEPT:]:
        index.unlink(missing_ok=True)
        for code in code_folder().glob(f"{index.stem}.*.nbc"):
            code.unlink(missing_ok=True)
