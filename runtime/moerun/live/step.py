"""One layer's step: made of what its gate decided, and sorted by what the cache answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    NO_TOKEN_IDS,
    Context,
    ExpertCache,
    Kind,
    PolicyError,
    PolicySpec,
    Step,
    TokenRows,
    demand_order,
    pool_logits,
)
from moepolicy.kinds import HIT, LATE, MISS
from numpy.typing import NDArray

from moerun.offload.gate import Gate, pool_rows

FETCHED = frozenset({HIT, LATE, MISS})
"""What nearly every step consists of: hits and copies."""


class PassStart(NamedTuple):
    """What is known of a forward pass before its first layer.

    token_ids        of the pass's tokens, int32[tokens]; empty where nobody reads them
    begins_sequence  whether nothing of the text came before
    """

    token_ids: NDArray[np.int32] = NO_TOKEN_IDS
    begins_sequence: bool = False


class StepMaker:
    """Makes the steps that one policy is asked about, with what it reads and no more."""

    def __init__(self, context: Context, policy: PolicySpec) -> None:
        # Looked up, as adding takes five times as long.
        keys = np.arange(context.n_layers * context.n_experts, dtype=np.int32)
        self._keys = list(keys.reshape(context.n_layers, context.n_experts))
        self._label = policy.label
        self._horizon = policy.horizon
        self.reads_predictions = policy.horizon > 0
        self.reads_logits = "logits" in policy.requires
        self.routes = policy.routes
        self.pass_start = PassStart()
        """Of the forward pass in progress."""

    def step(self, number: int, layer: int, gate: Gate, *, asked: bool = True) -> Step:
        """The step of ``layer``. PolicyError where the gates were not asked as many layers ahead
        as the policy reads predictions, unless it wanted none: ``asked`` is false."""
        keys, weights = demand_order(self._keys[layer][gate.ids], gate.weights)
        logits = gate.logits if self.reads_logits else None
        return Step(
            number,
            layer,
            keys,
            weights,
            NO_LOGITS if logits is None else pool_logits(logits),
            self._predicted(gate) if self._horizon and asked else NO_PREDICTIONS,
            len(gate.ids),
            token_ids=self.pass_start.token_ids,
            begins_pass=layer == 0,
            begins_sequence=layer == 0 and self.pass_start.begins_sequence,
        )

    def rows(self, gate: Gate) -> TokenRows | None:
        """The gate's rows, for a policy that routes to rewrite; None for the others.

        A row has its experts by descending weight, in which order a trace has them: a policy is to
        see the same, live and simulated. PolicyError where the gate gives no logits.
        """
        if not self.routes:
            return None
        if gate.logits is None:
            raise PolicyError(
                f"policy '{self._label}' gives tokens other experts by the gates' logits, and the "
                "model's gates give none"
            )
        logits = np.asarray(gate.logits, np.float16).astype(np.float32)
        order = by_weight(gate.weights)
        return TokenRows(
            np.take_along_axis(gate.ids, order, axis=1).astype(np.int32),
            np.take_along_axis(gate.weights, order, axis=1).astype(np.float32),
            logits,
        )

    def _predicted(self, gate: Gate) -> NDArray[np.float32]:
        found = 0 if gate.predicted is None else len(gate.predicted)
        if gate.predicted is None or found < self._horizon:
            raise PolicyError(
                f"policy '{self._label}' reads predictions {self._horizon} layers ahead, and "
                f"is given them {found} ahead"
            )
        return pool_rows(gate.predicted[: self._horizon])


def by_weight(weights: NDArray[Any]) -> NDArray[np.intp]:
    """Where each token's experts are by descending weight; equal weights: the router's order."""
    return np.argsort(-weights, axis=1, kind="stable")


def as_in_gate(rows: TokenRows, gate: Gate) -> TokenRows:
    """The same with every expert at the place in its row where ``gate`` had it or the one that it
    was chosen instead of."""
    order = by_weight(gate.weights)
    ids, weights = np.empty_like(rows.ids), np.empty_like(rows.weights)
    np.put_along_axis(ids, order, rows.ids, axis=1)
    np.put_along_axis(weights, order, rows.weights, axis=1)
    return rows._replace(ids=ids, weights=weights)


class Opened(NamedTuple):
    """The keys of a step that has begun, by what becomes of them, each list in router order.

    hits         they are here
    substitutes  (wanted, who runs in its place)
    on_cpu       computed on the CPU
    skipped      nothing runs for them
    absent       their copies are on the way or queued
    """

    hits: list[int]
    substitutes: list[tuple[int, int]]
    on_cpu: list[int]
    skipped: list[int]
    absent: list[int]


def opened(cache: ExpertCache, keys: list[int], outcome: list[int]) -> Opened:
    """Sort the keys of the step in progress by what ``cache`` answered for each."""
    if outcome.count(HIT) == len(keys):
        return Opened(keys, [], [], [], [])
    found = Opened([], [], [], [], [])
    hits, absent = found.hits, found.absent
    if FETCHED.issuperset(outcome):
        for key, kind in zip(keys, outcome, strict=True):
            (hits if kind == HIT else absent).append(key)
        return found
    lists = {Kind.HIT: hits, Kind.COMPUTE: found.on_cpu, Kind.SKIP: found.skipped}
    for rank, (key, kind) in enumerate(zip(keys, outcome, strict=True)):
        if kind == Kind.SUBSTITUTE:
            found.substitutes.append((key, cache.substitute(rank)))
        else:
            lists.get(Kind(kind), absent).append(key)
    return found
