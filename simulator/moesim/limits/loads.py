"""The fewest loads a cache of a given size needs for a trace, knowing the future."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UsageError
from moesim.workload.steps import Workload

Given = ParamSpec("Given")
Found = TypeVar("Found")


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
    workload: Workload, slots: int, scope: str, *, bypass: bool = True, cold: bool = False
) -> int:
    """The fewest copies over the link that serve every step from caches that start empty.

    With bypass (what no policy can beat, prefetching or not, unless it computes a miss on the
    CPU or changes the routing): after each step a domain keeps, of its cache and the step's
    experts, the ``slots`` that are used soonest. Without (what no policy can beat that copies
    only on demand and keeps what it copied while its step lasts): it keeps the step's experts,
    and of the others those used soonest; of a step wider than the cache any ``slots`` experts.
    ``slots`` is per layer; scope "global" pools them. ``cold``: the caches start empty with every
    sequence. SimulationError for another scope.
    """
    if cold:
        return sum(min_loads(part, slots, scope, bypass=bypass) for part in workload.sequences())
    counts = windows(workload, *domains(workload, slots, scope), workload.n_steps, bypass=bypass)
    return int(counts[0, 0, 0])


def domains(workload: Workload, slots: int, scope: str) -> tuple[NDArray[np.int32], int, int]:
    """Which cache each step uses, how many there are, and what each holds."""
    n_layers = workload.meta.n_layers
    if scope == "layer":
        return workload.layer, n_layers, slots
    if scope == "global":
        return np.zeros(workload.n_steps, np.int32), 1, slots * n_layers
    raise UsageError(f"unknown scope '{scope}': it is 'layer' or 'global'")


def windows(
    workload: Workload,
    domain_of: NDArray[np.int32],
    n_domains: int,
    capacity: int,
    stride: int,
    *,
    count: int = 1,
    bypass: bool = True,
) -> NDArray[np.int64]:
    """int64[starts, count, 2]: from every ``stride`` steps, for windows of 1, 2, ... ``count``
    strides, the loads from empty caches and those of them that the best content would spare."""
    from moesim.limits.belady_kernel import window_loads

    found = window_loads(
        workload.next_use,
        workload.offsets,
        domain_of,
        n_domains,
        capacity,
        stride,
        count,
        bypass,
    )
    workload.release()
    return found
