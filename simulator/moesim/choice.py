"""A machine and cache sizes on which policies differ, for a comparison that names none.

With as many slots as a token has experts all policies that load on demand are alike, and where
copies take next to no time all policies are as fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from moepolicy.amounts import counted
from numpy.typing import NDArray

from moesim.curves.hit_ratios import hit_curve
from moesim.machine.profile import DEFAULT_MACHINE, Machine, load_machine, machine_names
from moesim.machine.speed import copy_ns, layer_ns
from moesim.sizes import quarters, sizes_of
from moesim.workload.steps import Workload

LOOKED_AT = 20_000  # tokens that the choice is made on
LEAST_GAP = 0.005  # of hit ratios: less is no difference to choose sizes by
LEAST_COPYING = 0.25  # of the time of compute: below it copies hide or hardly count


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why in a line; ``why`` is empty where nothing was."""

    machine: Machine
    slots: list[int]
    why: str


def choose(
    workload: Workload,
    scope: str,
    expert_bytes: int | None,
    *,
    machine: Machine | None,
    slots: list[int] | None,
) -> Choice:
    """Choose what is None of the two. ``expert_bytes`` None: there are no times to choose by.

    Slots: the most, the fewest, and those between at which LRU's hit ratio is farthest below
    Belady's. Machine: the default one if copies count there, else the shipped one on which they
    take a time nearest to that of compute.
    """
    looked_at = workload.head(LOOKED_AT)
    curves = [hit_curve(looked_at, name, scope) for name in ("lru", "belady")]
    gap = curves[1] - curves[0]
    reasons = []
    if slots is None:
        slots = _sizes(gap, workload.meta.n_experts)
        reasons.append(_why_sizes(gap, slots))
    if machine is None:
        most = max(slots, key=lambda size: gap[min(size, len(gap) - 1)])
        hit = float(curves[0][min(most, len(gap) - 1)])
        misses = (1 - hit) * len(looked_at.keys) / looked_at.n_steps
        machine, why = _machine(workload, expert_bytes, misses, most)
        reasons += [why] if why else []
    return Choice(machine, slots, "; ".join(reason for reason in reasons if reason))


def _sizes(gap: NDArray[np.float64], n_experts: int) -> list[int]:
    """Three sizes at which the gap is wide: half of the widest or more."""
    inner = gap[:n_experts]
    if inner.max() < LEAST_GAP:
        return quarters(n_experts)
    wide = np.flatnonzero(inner >= inner.max() / 2)
    return sorted({int(wide[0]), int(inner.argmax()), int(wide[-1])})


def _why_sizes(gap: NDArray[np.float64], slots: list[int]) -> str:
    points = [100 * float(gap[size]) for size in slots]
    named = ", ".join(map(str, slots))
    if max(points) < 100 * LEAST_GAP:
        return f"slots {named}, because at no size does belady hit more than lru"
    least, most = f"{min(points):.0f}", f"{max(points):.0f}"
    span = most if least == most else f"{least} to {most}"
    return f"slots {named}, because there belady hits {span} points more than lru"


def _machine(
    workload: Workload, expert_bytes: int | None, misses: float, slots: int
) -> tuple[Machine, str]:
    """The machine, and why it is not the default one where it is not. ``misses``: of a step."""
    default = load_machine(DEFAULT_MACHINE)
    if expert_bytes is None:
        return default, ""
    share = _copying(default, workload, expert_bytes, misses)
    if share >= LEAST_COPYING:
        return default, ""
    others = [load_machine(name) for name in machine_names() if name != DEFAULT_MACHINE]
    shares = {one.name: _copying(one, workload, expert_bytes, misses) for one in others}
    # Where copies take as long as compute, they can be hidden, and not without a good policy.
    found = min(others, key=lambda one: (abs(math.log(shares[one.name] or 1e-9)), one.name))
    return found, (
        f"machine {found.name}, because there lru's copies at {counted(slots, 'slot')} take "
        f"{shares[found.name]:.0%} of the time of compute, and on {default.name} {share:.0%}, "
        "which leaves little to tell policies apart"
    )


def _copying(machine: Machine, workload: Workload, expert_bytes: int, misses: float) -> float:
    """The time of a step's copies over that of its compute."""
    sizes = sizes_of(workload.meta, expert_bytes)
    computed_ns = layer_ns(machine, sizes, workload.meta.top_k)
    if computed_ns is None:  # the dense weights are unknown: the experts are most of it
        k = workload.meta.top_k
        computed_ns = k * machine.expert_ns(1, sizes.expert_bytes, sizes.expert_params)
    return misses * copy_ns(machine, expert_bytes) / max(1, computed_ns)
