"""How much of the way from one policy (LRU) to the limit each other policy goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesim.errors import SimulationError

if TYPE_CHECKING:
    from moesim.simulate import Result


@dataclass(frozen=True)
class Gap:
    """One policy's share of the gap between the baseline and the limit.

    0 is as good as the baseline, 1 the limit, below 0 worse than the baseline; None where the
    baseline is at the limit already, so that there is no gap.
    """

    policy: str
    loads: float | None
    time: float | None


def gap_closed(
    results: Sequence[Result], limit_time_s: float, *, baseline: str = "lru"
) -> list[Gap]:
    """The share each of ``results`` closes, in their order.

    They are of one trace, machine, scope and number of slots; one is of ``baseline``.
    ``limit_time_s`` is their `min_time_ns`, in seconds. SimulationError where they are not such.
    """
    points = {(r.trace, r.machine, r.scope, r.slots, r.expert_bytes) for r in results}
    if len(points) > 1:
        raise SimulationError("gap_closed: the results are of different traces, caches or machines")
    base = next((r for r in results if r.policy == baseline), None)
    if base is None:
        raise SimulationError(f"the gap to the limit is measured from '{baseline}': compare it too")
    return [
        Gap(
            result.policy,
            _share(base.loads, result.loads, base.limit_loads),
            _share(base.time_s, result.time_s, limit_time_s),
        )
        for result in results
    ]


def _share(base: float, found: float, limit: float) -> float | None:
    return (base - found) / (base - limit) if base > limit else None
