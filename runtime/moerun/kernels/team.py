"""Compiled functions on the threads that torch computes with.

torch's threads are those of an OpenMP runtime, which wait busily for a short time after each
operation: between two operations of torch a call on them begins within a few microseconds. Another
pool of threads would have to be woken for each call, and would contend with the first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

Call = Callable[[int, int, int], None]


def run_on_all(work: int, argument: int) -> None:
    """Call the C function at ``work`` with one word on as many threads as torch uses, this one
    included, and return when all have returned. The interpreter's lock is released."""
    threads = torch.get_num_threads()
    if threads == 1:
        run_here(work, argument)
    else:
        _team()(work, argument, threads)


def run_here(work: int, argument: int) -> None:
    """Call the C function at ``work`` with one word on this thread."""
    _callable(work)(argument)


@cache
def _callable(work: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(work)


@cache
def _team() -> Call:
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime's threads, or Windows
        return _in_a_pool
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda work, argument, threads: parallel(work, argument, threads, 0)


def _in_a_pool(work: int, argument: int, threads: int) -> None:
    others = [_pool(threads - 1).submit(run_here, work, argument) for _ in range(threads - 1)]
    run_here(work, argument)
    for each in others:
        each.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "compute")
