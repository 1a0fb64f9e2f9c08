"""One layer's step: made of what its gate decided, and sorted by what the cache answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    Context,
    ExpertCache,
    Kind,
    PolicyError,
    PolicySpec,
    Step,
    demand_order,
    pool_logits,
)
from moepolicy.kinds import HIT, LATE, MISS
from numpy.typing import NDArray

from moerun.offload.gate import Gate, pool_rows

FETCHED = frozenset({HIT, LATE, MISS})
"""What nearly every step consists of: hits and copies."""


class StepMaker:
    """Makes the steps that one policy is asked about, with what it reads and no more."""

    def __init__(self, context: Context, policy: PolicySpec) -> None:
        self._n_experts = context.n_experts
        self._label = policy.label
        self._horizon = policy.horizon
        self.reads_logits = "logits" in policy.requires

    def step(self, number: int, layer: int, gate: Gate) -> Step:
        """The step of ``layer``. PolicyError where the gates were not asked as many layers ahead
        as the policy reads predictions."""
        experts, weights = demand_order(gate.ids, gate.weights)
        logits = gate.logits if self.reads_logits else None
        return Step(
            number=number,
            layer=layer,
            experts=experts + layer * self._n_experts,
            weights=weights,
            logits=NO_LOGITS if logits is None else pool_logits(logits),
            predicted=self._predicted(gate) if self._horizon else NO_PREDICTIONS,
            tokens=len(gate.ids),
        )

    def _predicted(self, gate: Gate) -> NDArray[np.float32]:
        found = 0 if gate.predicted is None else len(gate.predicted)
        if gate.predicted is None or found < self._horizon:
            raise PolicyError(
                f"policy '{self._label}' reads predictions {self._horizon} layers ahead, and "
                f"is given them {found} ahead"
            )
        return pool_rows(gate.predicted[: self._horizon])


class Opened(NamedTuple):
    """The keys of a step that has begun, by what becomes of them, each list in router order.

    hits       they are here
    stand_ins  (wanted, who runs in its place)
    aside      computed on the CPU
    skipped    nothing runs for them
    absent     their copies are on the way or queued
    """

    hits: list[int]
    stand_ins: list[tuple[int, int]]
    aside: list[int]
    skipped: list[int]
    absent: list[int]


def opened(cache: ExpertCache, keys: Sequence[int], outcome: Sequence[int]) -> Opened:
    """Sort the keys of the step in progress by what ``cache`` answered for each."""
    found = Opened([], [], [], [], [])
    hits, absent = found.hits, found.absent
    if FETCHED.issuperset(outcome):
        for key, kind in zip(keys, outcome, strict=True):
            (hits if kind == HIT else absent).append(key)
        return found
    lists = {Kind.HIT: hits, Kind.COMPUTE: found.aside, Kind.SKIP: found.skipped}
    for rank, (key, kind) in enumerate(zip(keys, outcome, strict=True)):
        if kind == Kind.SUBSTITUTE:
            found.stand_ins.append((key, cache.stand_in(rank)))
        else:
            lists.get(Kind(kind), absent).append(key)
    return found
