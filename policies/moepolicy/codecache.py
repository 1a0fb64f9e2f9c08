"""Compiled code kept on disk from run to run, under its fingerprint, so that it is never stale."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT = 512  # files; a replay of one policy with one set of features is two


def is_kept(name: str) -> bool:
    """Whether code of this name lies on disk."""
    return (_folder() / f"{name}.nbi").is_file()


def keep(dispatcher: Any, name: str) -> None:
    """Have numba's ``dispatcher`` look for its code on disk before it compiles it, and leave it
    there under ``name``. Where that cannot be read or written, code is compiled each time."""
    from numba.core.caching import CompileResultCacheImpl, FunctionCache

    class Locator:
        def get_cache_path(self) -> str:
            return str(_folder())

        def ensure_cache_path(self) -> None:
            _folder().mkdir(parents=True, exist_ok=True)

        def get_source_stamp(self) -> str:
            return name

    class Impl(CompileResultCacheImpl):  # type: ignore[misc]
        def __init__(self, py_func: Any) -> None:
            self._lineno = py_func.__code__.co_firstlineno
            self._locator = Locator()
            self._filename_base = name

    class Cache(FunctionCache):  # type: ignore[misc]
        _impl_class = Impl

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            with suppress(Exception):  # a damaged file: whatever unpickling it may raise
                return super().load_overload(sig, target_context)
            return None

        def save_overload(self, sig: Any, data: Any) -> None:
            with suppress(OSError):
                super().save_overload(sig, data)
                _drop_oldest()

    dispatcher._cache = Cache(dispatcher.py_func)


def _folder() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    return Path(chosen) if chosen else home / "moepolicy" / "compiled"


def _drop_oldest() -> None:
    files = [(path.stat().st_mtime, path) for path in _folder().glob("*.nb?")]
    for _, path in sorted(files, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
