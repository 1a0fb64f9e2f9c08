"""How fast this machine reads its memory and its disk: what weights cannot be read faster than."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from statistics import median

import torch

_READ_BYTES = 1 << 30
_DISK_BYTES, _PIECE_BYTES = 1 << 29, 8 << 20
_TIMES = 7


def memory_bytes_per_s(threads: int) -> float:
    """Of a sum over 1 GiB by so many threads: the median of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        words = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
        took = []
        for _ in range(_TIMES):
            began_s = time.perf_counter()
            words.sum()
            took.append(time.perf_counter() - began_s)
        return _READ_BYTES / median(took)
    finally:
        torch.set_num_threads(before)


def disk_bytes_per_s(path: Path) -> float:
    """Of reading a file past the page cache, in order."""
    n_bytes = min(_DISK_BYTES, path.stat().st_size // _PIECE_BYTES * _PIECE_BYTES)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        with mmap.mmap(-1, _PIECE_BYTES) as piece:
            began_s = time.perf_counter()
            for offset in range(0, n_bytes, _PIECE_BYTES):
                os.preadv(fd, [piece], offset)
            took_s = time.perf_counter() - began_s
    finally:
        os.close(fd)
    return n_bytes / took_s if n_bytes else float("nan")
