"""Hit ratios of a policy for every cache size, from one pass over the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from moepolicy.console import nearest
from numpy.typing import NDArray

from moesim.errors import UsageError
from moesim.limits.loads import domains
from moesim.workload.steps import Workload

# In the order of the constants in moesim.curves.stack_kernel.
ONE_PASS = ("lru", "lfu", "belady", "belady-bypass")
LIMIT = "belady-bypass"


def hit_curve(
    workload: Workload, policy: str, scope: str, *, cold: bool = False
) -> NDArray[np.float64]:
    """float64[n_experts + 1]: the hit ratio with 0, 1, ... n_experts slots a layer.

    Equal, at every size, to what the state machine counts for `lru`, `lfu` and `belady`, and
    for `belady-bypass` to the limit, which that policy reaches. Caches start empty, and if
    ``cold`` again with every sequence. Raises SimulationError for a policy whose caches of
    different sizes do not nest.
    """
    check_one_pass(policy)
    from moesim.curves.stack_kernel import hits_by_size

    hits = np.zeros(workload.n_keys + 1, np.int64)
    for part in workload.sequences() if cold else [workload]:
        domain_of, n_domains, _ = domains(part, 0, scope)
        hits += hits_by_size(
            part.keys,
            part.next_use,
            part.offsets,
            domain_of,
            n_domains,
            part.n_keys,
            ONE_PASS.index(policy),
        )
    slots = np.arange(workload.meta.n_experts + 1)
    held = slots if scope == "layer" else slots * workload.meta.n_layers
    return np.asarray(hits[held] / len(workload.keys), np.float64)


def check_one_pass(policy: str) -> None:
    """UsageError for a policy whose caches of different sizes do not nest."""
    if policy not in ONE_PASS:
        raise UsageError(
            f"policy '{policy}' has no curve from one pass; {nearest(policy, ONE_PASS)}; "
            "simulate others size by size with 'moesim compare'"
        )


def shuffled(workload: Workload, seed: int) -> Workload:
    """The tokens and prompts in random order, which have their popularity but no locality.

    Its sequences have as many tokens and prompts as the workload's have, of any of them.
    """
    starts = np.flatnonzero(np.diff(workload.rows[:, 0], prepend=-1) != 0)
    lengths = np.diff(np.append(starts, workload.n_steps))
    order = np.random.default_rng(seed).permutation(len(starts))
    steps = _runs(starts[order], lengths[order])
    widths = np.diff(workload.offsets)[steps]
    at = _runs(workload.offsets[steps], widths)
    return replace(
        workload,
        title=f"{workload.title}, shuffled",
        keys=workload.keys[at],
        weights=workload.weights[at],
        routed=workload.routed[at],
        offsets=np.concatenate(([0], np.cumsum(widths))).astype(np.int64),
        layer=workload.layer[steps],
        tokens=workload.tokens[steps],
        decode=workload.decode[steps],
        rows=workload.rows[steps],
        starts=(np.cumsum(lengths[order]) - lengths[order])[
            np.searchsorted(starts, workload.starts)
        ],
    )


def _runs(firsts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of runs that begin at ``firsts``, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(firsts - ends + lengths, lengths)
