"""The fewest loads a cache of a given size needs for a trace, knowing the future."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UsageError
from moesim.workload.steps import Workload

STRETCH = 1 << 18  # steps in memory together

Given = ParamSpec("Given")
Found = TypeVar("Found")
Shares = tuple[int, ...] | None
"""The slots of each layer, as `moepolicy.PolicySpec.shares` gives them; None: all have as many."""


def remembered(
    function: Callable[Concatenate[Workload, Given], Found],
) -> Callable[Concatenate[Workload, Given], Found]:
    """Keep what ``function`` found about a workload while the workload lives.

    A comparison asks for the same limit once a policy.
    """
    found: dict[tuple[object, ...], Found] = {}

    def ask(workload: Workload, /, *given: Given.args, **named: Given.kwargs) -> Found:
        key = (id(workload), *given, *sorted(named.items()))
        if key not in found:
            found[key] = function(workload, *given, **named)
            weakref.finalize(workload, found.pop, key, None)
        return found[key]

    update_wrapper(ask, function)
    return ask


@remembered
def min_loads(
    workload: Workload,
    slots: int,
    scope: str,
    *,
    bypass: bool = True,
    cold: bool = False,
    shares: Shares = None,
) -> int:
    """The fewest copies over the link that serve every step from caches that start empty.

    With bypass (what no policy can beat, prefetching or not, unless it computes a miss on the
    CPU or changes the routing): after each step a domain keeps, of its cache and the step's
    experts, the ``slots`` that are used soonest. Without (what no policy can beat that copies
    only on demand and keeps what it copied while its step lasts): it keeps the step's experts,
    and of the others those used soonest; of a step wider than the cache any ``slots`` experts.
    ``slots`` is per layer; scope "global" pools them, and with ``shares`` layer l has ``shares[l]``
    instead. ``cold``: the caches start empty with every sequence. SimulationError for another
    scope.
    """
    if cold:
        return sum(
            min_loads(part, slots, scope, bypass=bypass, shares=shares)
            for part in workload.sequences()
        )
    caches = domains(workload, slots, scope, shares)
    counts = windows(workload, *caches, workload.n_steps, bypass=bypass)
    return int(counts[0, 0, 0])


def domains(
    workload: Workload, slots: int, scope: str, shares: Shares = None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Which cache each step uses [steps], and what each cache holds [caches]."""
    n_layers = workload.meta.n_layers
    if scope == "layer":
        held = np.full(n_layers, slots) if shares is None else np.array(shares)
        return workload.layer, held.astype(np.int64)
    if scope == "global":
        return np.zeros(workload.n_steps, np.int32), np.array([slots * n_layers], np.int64)
    raise UsageError(f"unknown scope '{scope}': it is 'layer' or 'global'")


def windows(
    workload: Workload,
    domain_of: NDArray[np.int32],
    capacity: NDArray[np.int64],
    stride: int,
    *,
    count: int = 1,
    bypass: bool = True,
) -> NDArray[np.int64]:
    """int64[starts, count, 2]: from every ``stride`` steps, for windows of 1, 2, ... ``count``
    strides, the loads from empty caches and those of them that the best content would spare.

    A stretch of the trace is in memory at a time: as many windows as fit in it, or of a longer
    window a part.
    """
    from moesim.limits.belady_kernel import new_caches, window_loads

    n_steps = workload.n_steps
    counts = np.zeros((-(-n_steps // stride), count, 2), np.int64)
    caches = new_caches(capacity, _widest(workload), n_steps)
    future = workload.next_use, workload.offsets, domain_of, capacity
    for starts, steps in _stretches(len(counts), n_steps, stride, count):
        window_loads(counts, starts, steps, caches, *future, stride, bypass)
        workload.release()
    return counts


Span = tuple[int, int]


def _stretches(n_starts: int, n_steps: int, stride: int, count: int) -> Iterator[tuple[Span, Span]]:
    """Which windows and which steps are looked at together."""
    if stride * count <= STRETCH:
        n = STRETCH // stride
        for first in range(0, n_starts, n):
            yield (first, min(first + n, n_starts)), (0, n_steps)
        return
    for start in range(n_starts):
        end = min((start + count) * stride, n_steps)
        for first in range(start * stride, end, STRETCH):
            yield (start, start + 1), (first, min(first + STRETCH, end))


def _widest(workload: Workload) -> int:
    """The most experts that a step demands."""
    widest = 0
    for first in range(0, workload.n_steps, STRETCH):
        offsets = workload.offsets[first : first + STRETCH + 1]
        widest = max(widest, int(np.diff(offsets).max()))
        workload.release()
    return widest
