"""Hit ratios of a policy for every cache size, from one pass over the trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from moepolicy.console import nearest
from numpy.typing import NDArray

from moesim.errors import UsageError
from moesim.limits.loads import domains
from moesim.workload.loading import remade
from moesim.workload.steps import Workload, changes

STRETCH = 1 << 18  # steps in memory together
SCATTERED = 512  # tokens read together that lie anywhere: a file's pages come 64 KiB at a time

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
    hits = np.zeros(workload.n_keys + 1, np.int64)
    for part in workload.sequences() if cold else [workload]:
        hits += _hits(part, scope, ONE_PASS.index(policy))
    slots = np.arange(workload.meta.n_experts + 1)
    held = slots if scope == "layer" else slots * workload.meta.n_layers
    return np.asarray(hits[held] / len(workload.keys), np.float64)


def _hits(part: Workload, scope: str, policy: int) -> NDArray[np.int64]:
    """The hits of caches of 0, 1, ... experts that start empty."""
    from moesim.curves.stack_kernel import count_hits, hits_by_size, new_stacks

    domain_of, capacity = domains(part, 0, scope)
    stacks = new_stacks(len(capacity), part.n_keys)
    for first in range(0, part.n_steps, STRETCH):
        last = min(first + STRETCH, part.n_steps)
        count_hits(stacks, part.keys, part.next_use, part.offsets, domain_of, first, last, policy)
        part.release()
    return hits_by_size(stacks)


def check_one_pass(policy: str) -> None:
    """UsageError for a policy whose caches of different sizes do not nest."""
    if policy not in ONE_PASS:
        raise UsageError(
            f"policy '{policy}' has no curve from one pass; {nearest(policy, ONE_PASS)}; "
            "simulate others size by size with 'moesim compare'"
        )


def shuffled(workload: Workload, seed: int, folder: Path | None = None) -> Workload:
    """The tokens and prompts in random order, which have their popularity but no locality.

    Its sequences have as many tokens and prompts as the workload's have, of any of them. With
    ``folder``, an empty one, its arrays lie there.
    """
    starts = _starts(workload)
    order = np.random.default_rng(seed).permutation(len(starts))
    title = f"{workload.title}, shuffled"
    return remade(workload, title, _in_order(workload, starts, order), folder)


def _starts(workload: Workload) -> NDArray[np.int64]:
    """The step that each token or prompt begins with."""
    found = [np.zeros(1, np.int64)]
    for first in range(0, workload.n_steps, STRETCH):
        rows = workload.rows[first : first + STRETCH + 1, 0]
        found.append(first + 1 + np.flatnonzero(changes(rows)))
        workload.release()
    return np.concatenate(found)


def _in_order(
    workload: Workload, starts: NDArray[np.int64], order: NDArray[np.int64]
) -> Iterator[dict[str, NDArray[Any]]]:
    """The columns of a workload whose tokens and prompts are those of ``workload`` in ``order``."""
    lengths = np.diff(np.append(starts, workload.n_steps))
    begins = np.cumsum(lengths[order]) - lengths[order]
    yield {
        "row_layer": workload.row_layer,
        "starts": begins[np.searchsorted(starts, workload.starts)],
        "offsets": np.zeros(1, np.int64),
    }
    n_demands = 0
    stride = max(1, min(SCATTERED, STRETCH // max(1, int(lengths.max()))))
    for at in range(0, len(order), stride):
        some = order[at : at + stride]
        steps = _runs(starts[some], lengths[some])
        firsts = workload.offsets[steps]
        widths = workload.offsets[steps + 1] - firsts
        keys = _runs(firsts, widths)
        ends = n_demands + np.cumsum(widths)
        n_demands = int(ends[-1])
        workload.release()
        found = {"offsets": ends}
        for at_each, names in (
            (keys, ("keys", "weights", "routed")),
            (steps, ("layer", "tokens", "decode", "rows")),
        ):
            for name in names:
                found[name] = getattr(workload, name)[at_each]
                workload.release()
        yield found


def _runs(firsts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of runs that begin at ``firsts``, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(firsts - ends + lengths, lengths)
