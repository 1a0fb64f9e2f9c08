"""Compiled code kept on disk from run to run, under its fingerprint, so that it is never stale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moepolicy.numba_internals import keep_in

KEPT = 512  # files; a replay of one policy with one set of features is two


def is_kept(name: str) -> bool:
    """Whether code of this name lies on disk."""
    return (_folder() / f"{name}.nbi").is_file()


def keep(dispatcher: Any, name: str) -> None:
    """Have numba's ``dispatcher`` look for its code on disk before it compiles it, and leave it
    there under ``name``. Where that cannot be read or written, code is compiled each time."""
    keep_in(_folder, name, dispatcher, saved=_drop_oldest)


def _folder() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    return Path(chosen) if chosen else home / "moepolicy" / "compiled"


def _drop_oldest() -> None:
    files = [(path.stat().st_mtime, path) for path in _folder().glob("*.nb?")]
    for _, path in sorted(files, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
