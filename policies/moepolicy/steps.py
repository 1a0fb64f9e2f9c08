"""The unit of work: one expert step, and how a batch of tokens becomes one.

The live runtime and every replay build their steps with these functions, from the same float16
logits and float32 weights, so that a policy is asked the same question in both.
"""

from __future__ import annotations

from operator import ge
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_LOGITS: NDArray[np.float32] = np.empty(0, np.float32)
NO_PREDICTIONS: NDArray[np.float32] = np.empty((0, 0), np.float32)
NO_TOKEN_IDS: NDArray[np.int32] = np.empty(0, np.int32)


class Step(NamedTuple):
    """What a policy may know at one (token or batch of tokens, layer); nothing of the future.

    number     steps since the cache was made
    layer      mixture-of-experts layer, 0-based
    experts    keys (layer * n_experts + expert) wanted, int32[n], heaviest first
    weights    their gate weights as applied, summed over the batch, float32[n]
    logits     the gate's logits, float32[n_experts]; empty where the trace has none
    predicted  row j: the gate of layer + 1 + j applied to this layer's hidden state,
               float32[horizon, n_experts]; NaN past the last layer; no rows where the policy
               did not want them (`Policy.wants_predictions`)
    tokens     how many tokens the step serves
    backlog    copies queued or under way as the step begins: the link's load
    token_ids  the vocabulary ids of those tokens, int32[tokens]; empty where they are not known
    begins_pass      whether the step is the first of its forward pass
    begins_sequence  whether the step is the first of its sequence: a new text begins
    hits, late, misses  what the cache has counted before this step, since it was made
    """

    number: int
    layer: int
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    logits: NDArray[np.float32]
    predicted: NDArray[np.float32]
    tokens: int
    backlog: int = 0
    token_ids: NDArray[np.int32] = NO_TOKEN_IDS
    begins_pass: bool = False
    begins_sequence: bool = False
    hits: int = 0
    late: int = 0
    misses: int = 0


class TokenRows(NamedTuple):
    """The token rows of a step, for a policy that routes.

    ids      experts of the layer that the gate chose, int32[tokens, top_k], any order; a row that
             chose fewer ends in numbers that are no expert's
    weights  their gate weights as applied, float32[tokens, top_k]
    logits   the gate's logits, float32[tokens, n_experts]
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    logits: NDArray[np.float32]


def with_demand(
    step: Step,
    keys: NDArray[np.int32],
    weights: NDArray[np.float32],
    logits: NDArray[np.float32],
) -> Step:
    """``step`` with another demand and gate; compiled code has no ``_replace``."""
    return Step(
        step.number,
        step.layer,
        keys,
        weights,
        logits,
        step.predicted,
        step.tokens,
        step.backlog,
        step.token_ids,
        step.begins_pass,
        step.begins_sequence,
        step.hits,
        step.late,
        step.misses,
    )


def without_predictions(step: Step) -> Step:
    """``step`` as it is where no later gate was asked."""
    return Step(
        step.number,
        step.layer,
        step.experts,
        step.weights,
        step.logits,
        step.predicted[:0],
        step.tokens,
        step.backlog,
        step.token_ids,
        step.begins_pass,
        step.begins_sequence,
        step.hits,
        step.late,
        step.misses,
    )


def demand_order(
    ids: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The experts a batch wants, in router order, with their weights.

    ``ids`` and ``weights`` are [tokens, top_k]. One token keeps its experts by descending weight
    (equal weights: the router's order); several give the union by descending summed weight
    (equal sums: lowest expert).
    """
    ids = np.asarray(ids, np.int32)
    weights = np.asarray(weights, np.float32)
    if ids.shape[0] == 1:
        chosen, masses = ids[0], weights[0]
        row = masses.tolist()
        if all(map(ge, row, row[1:])):  # as nearly every gate gives them; sorting costs more
            return chosen, masses
        order = np.argsort(-masses, kind="stable")
        return chosen[order], masses[order]
    experts, inverse = np.unique(ids, return_inverse=True)
    mass = np.bincount(inverse.ravel(), weights=weights.ravel().astype(np.float64))
    order = np.lexsort((experts, -mass))
    return experts[order].astype(np.int32), mass[order].astype(np.float32)


def pool_logits(logits: NDArray[Any]) -> NDArray[np.float32]:
    """One row of gate logits for a batch: [tokens, n_experts] -> float32[n_experts].

    One token keeps its logits; several give the logarithm of the mean probability. A batch in
    which any row is missing (NaN) has no prediction.
    """
    rows: NDArray[np.float32] = np.asarray(logits, np.float16).astype(np.float32)
    if len(rows) == 1:
        return rows.reshape(-1)
    wide = rows.astype(np.float64)
    shifted = np.exp(wide - wide.max(axis=1, keepdims=True))
    mean = (shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0)
    pooled: NDArray[np.float32] = np.log(np.maximum(mean, np.finfo(np.float32).tiny)).astype(
        np.float32
    )
    return pooled
