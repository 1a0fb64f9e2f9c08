"""Routing by the policy: which experts a token gets, and with what weights.

Part of the state machine. A driver calls ``reroute`` before ``begin``, for a policy that has a
``route`` hook. The weights of a changed choice come from the gate's own logits, by the rule that
the model's gate computes its weights with; a row that the policy leaves alone keeps the weights
that the gate gave it, to the bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.asking import as_asked
from moepolicy.kinds import REROUTE, WrongAnswer
from moepolicy.policy import Context, Policy, PolicyError
from moepolicy.state import ALL_MASS, LOADING, REROUTED_MASS, RESIDENT, Cache
from moepolicy.steps import Step, TokenRows, with_demand

# What a gate makes weights of: of all its logits, or of those of the experts that it chose.
SOFTMAX = 0  # softmax over all experts, the chosen ones' as they are
SOFTMAX_CHOSEN = 1  # softmax over the chosen experts: the same as softmax over all, renormalised
SIGMOID = 2  # sigmoid of each
SIGMOID_CHOSEN = 3  # sigmoid of each, divided by their sum
SQRT_SOFTPLUS_CHOSEN = 4  # square root of the softplus of each, divided by their sum

WEIGHT_RULES = {
    "softmax": SOFTMAX,
    "softmax-topk-renorm": SOFTMAX_CHOSEN,
    "topk-softmax": SOFTMAX_CHOSEN,
    "sigmoid": SIGMOID,
    "sigmoid-renorm-scale": SIGMOID_CHOSEN,
    "sqrtsoftplus-renorm-scale": SQRT_SOFTPLUS_CHOSEN,
}
"""The rules by the names that a trace's metadata has for them."""


class RoutingRule(NamedTuple):
    """How a model's gate makes the weights of the experts that it chose from its logits."""

    name: str
    scale: float = 1.0  # what the weights are multiplied by at the end


class RoutingBuffers(NamedTuple):
    """The rule, and room for what is worked out of one step's rows."""

    rule: int
    scale: float
    resident: NDArray[np.bool_]  # [n_experts] as shown to the policy
    chosen: NDArray[np.int32]  # [top_k] as given to the policy, who may rewrite it
    row_keys: NDArray[np.int32]  # [top_k] the gate's choice for the row
    summed: NDArray[np.float64]  # [n_experts] the step's weight of each expert
    n_rows: NDArray[np.int32]  # [n_experts] the rows that use it; 0: none
    keys: NDArray[np.int32]  # [n_experts] the step's demand in router order
    weights: NDArray[np.float32]  # [n_experts] its weights
    used_by: NDArray[np.int32]  # [n_experts] by rank: how many rows use the demanded expert


def routing_buffers(context: Context, rule: RoutingRule | None) -> RoutingBuffers:
    """Room for the steps of ``context``. PolicyError where ``rule`` is not known here."""
    n, k = context.n_experts, context.top_k
    if rule is not None and rule.name not in WEIGHT_RULES:
        raise PolicyError(
            f"gate weights by '{rule.name}' cannot be computed anew for other experts: known are "
            f"{', '.join(WEIGHT_RULES)}"
        )
    return RoutingBuffers(
        rule=WEIGHT_RULES[rule.name] if rule else SOFTMAX,
        scale=float(rule.scale) if rule else 1.0,
        resident=np.zeros(n, np.bool_),
        chosen=np.zeros(k, np.int32),
        row_keys=np.zeros(k, np.int32),
        summed=np.zeros(n, np.float64),
        n_rows=np.zeros(n, np.int32),
        keys=np.zeros(n, np.int32),
        weights=np.zeros(n, np.float32),
        used_by=np.zeros(n, np.int32),
    )


def reroute(
    cache: Cache, policy: Policy, step: Step, rows: TokenRows, routing: RoutingBuffers
) -> int:
    """Ask the policy for each row of a step, before ``begin``.

    ``rows.ids`` and ``rows.weights`` are rewritten where the policy changed the choice. Returns
    how many experts the step demands now; ``routing`` has them in router order, with their weights
    and the number of rows that use each. WrongAnswer for an expert that does not exist or stands
    twice in a row.
    """
    step = as_asked(cache, step)
    cache.step[0] = step.number
    _show_residents(cache, step.layer, routing)
    for row in range(len(rows.ids)):
        _route_row(cache, policy, step, row, rows, routing)
    return _demand(step.layer, rows, routing)


def _show_residents(cache: Cache, layer: int, routing: RoutingBuffers) -> None:
    first = layer * cache.n_experts
    for expert in range(cache.n_experts):
        status = cache.status[first + expert]
        routing.resident[expert] = status in (RESIDENT, LOADING)


def _route_row(
    cache: Cache, policy: Policy, step: Step, row: int, rows: TokenRows, routing: RoutingBuffers
) -> None:
    logits = rows.logits[row]
    n = _n_chosen(rows.ids[row], cache.n_experts)
    ids, weights = rows.ids[row, :n], rows.weights[row, :n]
    chosen = routing.chosen[:n]
    for i in range(len(ids)):
        chosen[i] = ids[i]
        routing.row_keys[i] = ids[i] + step.layer * cache.n_experts
    asked = with_demand(step, routing.row_keys[:n], weights, logits)
    policy.route(asked, row, routing.resident, chosen)
    changed = False
    for i in range(len(ids)):
        cache.mass[ALL_MASS] += weights[i]
        _check_choice(chosen, i, cache.n_experts)
        if not _has(chosen, ids[i]):
            changed = True
            cache.mass[REROUTED_MASS] += weights[i]
            cache.counters[REROUTE] += 1
    if changed:
        _weigh_choice(routing, chosen, logits)
        for i in range(len(ids)):
            ids[i] = chosen[i]
            weights[i] = routing.weights[i]


def _n_chosen(ids: NDArray[np.int32], n_experts: int) -> int:
    """How many experts a row has: one that chose fewer than K ends in numbers of no expert."""
    n = 0
    while n < len(ids) and ids[n] < n_experts:
        n += 1
    return n


def _check_choice(chosen: NDArray[np.int32], i: int, n_experts: int) -> None:
    if chosen[i] < 0 or chosen[i] >= n_experts:
        raise WrongAnswer("route chose an expert that does not exist")
    for j in range(i):
        if chosen[j] == chosen[i]:
            raise WrongAnswer("route chose an expert twice for one token")


def _has(chosen: NDArray[np.int32], expert: int) -> bool:
    found = False
    for i in range(len(chosen)):
        found = found or chosen[i] == expert
    return found


def _weigh_choice(
    routing: RoutingBuffers, chosen: NDArray[np.int32], logits: NDArray[np.float32]
) -> None:
    """The weights of ``chosen`` by the gate's rule, into the first of ``routing.weights``."""
    rule = routing.rule
    most = float(logits[0])
    for e in range(len(logits)):
        most = max(most, float(logits[e]))
    total = 0.0
    if rule == SOFTMAX:
        for e in range(len(logits)):
            total += math.exp(float(logits[e]) - most)
    for i in range(len(chosen)):
        raw = _raw_weight(rule, float(logits[chosen[i]]), most)
        routing.summed[i] = raw
        if rule in (SOFTMAX_CHOSEN, SIGMOID_CHOSEN, SQRT_SOFTPLUS_CHOSEN):
            total += raw
    if rule == SIGMOID:
        total = 1.0
    for i in range(len(chosen)):
        routing.weights[i] = routing.summed[i] / total * routing.scale
        if not math.isfinite(routing.weights[i]):
            raise WrongAnswer("route chose an expert whose gate weight is not finite")


def _raw_weight(rule: int, logit: float, most: float) -> float:
    if rule in (SOFTMAX, SOFTMAX_CHOSEN):
        return math.exp(logit - most)
    if rule == SQRT_SOFTPLUS_CHOSEN:
        return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))
    return 1.0 / (1.0 + math.exp(-logit))


def _demand(layer: int, rows: TokenRows, routing: RoutingBuffers) -> int:
    """The union of the rows, as `moepolicy.steps.demand_order` orders it."""
    n_experts = len(routing.n_rows)
    for expert in range(n_experts):
        routing.n_rows[expert] = 0
        routing.summed[expert] = 0.0
    n = 0
    for row in range(len(rows.ids)):
        for i in range(_n_chosen(rows.ids[row], n_experts)):
            expert = rows.ids[row, i]
            if routing.n_rows[expert] == 0:
                routing.keys[n] = expert
                n += 1
            routing.n_rows[expert] += 1
            routing.summed[expert] += rows.weights[row, i]
    one = len(rows.ids) == 1
    for i in range(1, n):
        expert = routing.keys[i]
        j = i
        while j > 0 and _heavier(routing, expert, routing.keys[j - 1], one):
            routing.keys[j] = routing.keys[j - 1]
            j -= 1
        routing.keys[j] = expert
    for rank in range(n):
        expert = routing.keys[rank]
        routing.weights[rank] = routing.summed[expert]
        routing.used_by[rank] = routing.n_rows[expert]
        routing.keys[rank] = expert + layer * n_experts
    return n


def _heavier(routing: RoutingBuffers, one: int, other: int, in_order: bool) -> bool:
    """Whether ``one`` goes before ``other``; equal weights: the router's order of one token
    (``in_order``), else the lower expert."""
    weight, than = routing.summed[one], routing.summed[other]
    return bool(weight > than or (weight == than and not in_order and one < other))
