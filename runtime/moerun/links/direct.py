"""Reading records past the system's file cache.

A run whose experts do not fit host memory gains nothing from a second copy in the file cache, and
directly they are read faster, for a twentieth of the processor's time. A record, or a large piece
of one, is one read: the system has many requests of it under way at once, and pieces read by
several threads measured slower.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import torch

from moerun.errors import RunError
from moerun.format.names import RECORD_ALIGN
from moerun.format.tensorfile import read_at
from moerun.links.bus import Pieces
from moerun.store.expert_store import ExpertStore


class DirectRecords:
    """A store whose records never stay in the file cache. Safe to share between threads.

    Where the file system or the buffer does not allow direct reads (O_DIRECT wants both aligned
    to 4096 bytes), records are read through the cache and taken out of it again.
    """

    def __init__(self, store: ExpertStore) -> None:
        """Raises RunError where the system gives no say over its file cache."""
        if not hasattr(os, "posix_fadvise"):
            raise RunError("this system does not let a program read past its file cache")
        self.n_keys = store.n_keys
        self.record_bytes = store.record_bytes
        self._store = store
        self._fds: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        """Fill ``buffer``, uint8[record_bytes]; the errors name expert and file."""
        self._store.read_into(key, buffer, read=self._read, pieces=pieces)

    def close(self) -> None:
        """Close the files. Harmless when repeated."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1][0])

    def _read(self, path: Path, offset: int, buffer: torch.Tensor) -> int:
        fd, direct = self._open(path)
        if not direct or buffer.data_ptr() % RECORD_ALIGN:
            return _read_and_forget(path, offset, buffer)
        try:
            return read_at(fd, offset, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it opens files so, but does not read them
                raise
            return _read_and_forget(path, offset, buffer)

    def _open(self, path: Path) -> tuple[int, bool]:
        with self._lock:
            if path not in self._fds:
                flags = os.O_RDONLY | os.O_CLOEXEC
                try:
                    found = os.open(path, flags | os.O_DIRECT), True
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    found = os.open(path, flags), False
                self._fds[path] = found
            return self._fds[path]


def _read_and_forget(path: Path, offset: int, buffer: torch.Tensor) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        got = read_at(fd, offset, buffer)
        os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return got
    finally:
        os.close(fd)
