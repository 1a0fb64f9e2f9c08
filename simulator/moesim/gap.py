"""How much of the way from LRU to what no policy can beat a result goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import SimulationError
from moesim.result import Result

BASELINE = "lru"


@dataclass(frozen=True)
class Gap:
    """One policy's share of the gap between the baseline and the limit.

    0 is as good as the baseline, 1 the limit, below 0 worse than the baseline; None where the
    baseline is at the limit already, so that there is no gap. ``time`` is that spent on a token;
    None as well where it is not known.
    """

    policy: str
    loads: float | None
    time: float | None

    def row(self) -> dict[str, float | None]:
        """The gaps under the names that every output has for them; None where there is none."""
        return {"gap_closed_loads": self.loads, "gap_closed_time": self.time}


def gap_closed(results: Sequence[Result], *, baseline: str = BASELINE) -> list[Gap]:
    """The share each of ``results`` closes, in their order.

    They are of one trace, machine, scope and number of slots; one is of ``baseline``.
    SimulationError where they are not such, or were simulated without limits.
    """
    points = {(r.trace, r.machine, r.scope, r.slots, r.expert_bytes, r.cold) for r in results}
    if len(points) > 1:
        raise SimulationError("gap_closed: the results are of different traces, caches or machines")
    base = next((r for r in results if r.policy == baseline), None)
    if base is None:
        raise SimulationError(f"the gap to the limit is measured from '{baseline}': compare it too")
    if any(r.limit_loads is None for r in results):
        raise SimulationError("gap_closed: the results were simulated without their limits")
    return [gap_of(base.row(), result.row()) for result in results]


def gap_of(base: Mapping[str, Any], row: Mapping[str, Any]) -> Gap:
    """The share that a result closes of the gap between ``base`` and the result's limit; both
    as `Result.row` gives them."""
    times = base["tokens_per_s"], row["tokens_per_s"], row["limit_tokens_per_s"]
    return Gap(
        row["policy"],
        _share(base["loads"], row["loads"], row["limit_loads"]),
        None if None in times else _share(*(1 / tokens_per_s for tokens_per_s in times)),
    )


def _share(base: float, found: float, limit: float | None) -> float | None:
    if limit is None or base <= limit:
        return None
    return (base - found) / (base - limit)
