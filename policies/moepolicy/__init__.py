"""Policies for caching and prefetching experts, and the one state machine that runs them.

The same policy object, driven by the same functions, decides in the simulator (`moesim`) and in
the live runtime (`moerun`).

    cache = ExpertCache(Context(n_layers=32, n_experts=8, top_k=2, slots=4), policy)

A key is ``layer * n_experts + expert``, an int; slots are per layer. An author writes a `Policy`,
which is told of `Step` after `Step`; PolicyError says what is wrong with one, `PolicyFailed` what
went wrong in its own code.

NO_USE          int: the next use of an expert that is never used again
NO_LOGITS       float32[0]: the logits of a step whose trace has none
NO_PREDICTIONS  float32[0, 0]: the predictions of a step whose trace has none
NO_TOKEN_IDS    int32[0]: the token ids of a step whose trace has none, or nobody reads
WEIGHT_RULES    the rules by which gates make weights, by name; a `RoutingRule` is one and its scale
Journal         a list of (`Call`, key): what `replay_journal` drives a cache by
"""

from moepolicy.cache import Event, ExpertCache, Journal, Transfer, replay_journal
from moepolicy.calls import Call
from moepolicy.composite import Composite
from moepolicy.counts import Counts, counts_of
from moepolicy.kinds import Kind
from moepolicy.library.clairvoyant.future import next_use
from moepolicy.policy import (
    NO_USE,
    Context,
    Policy,
    PolicyError,
    PolicyFailed,
    PolicyUsageError,
    Same,
)
from moepolicy.registry import find_policy, policy_names
from moepolicy.routing import WEIGHT_RULES, RoutingRule
from moepolicy.scores import ByScore
from moepolicy.spec import PolicySpec
from moepolicy.steps import (
    NO_LOGITS,
    NO_PREDICTIONS,
    NO_TOKEN_IDS,
    Step,
    TokenRows,
    demand_order,
    pool_logits,
)

__all__ = [
    "NO_LOGITS",
    "NO_PREDICTIONS",
    "NO_TOKEN_IDS",
    "NO_USE",
    "WEIGHT_RULES",
    "ByScore",
    "Call",
    "Composite",
    "Context",
    "Counts",
    "Event",
    "ExpertCache",
    "Journal",
    "Kind",
    "Policy",
    "PolicyError",
    "PolicyFailed",
    "PolicySpec",
    "PolicyUsageError",
    "RoutingRule",
    "Same",
    "Step",
    "TokenRows",
    "Transfer",
    "counts_of",
    "demand_order",
    "find_policy",
    "next_use",
    "policy_names",
    "pool_logits",
    "replay_journal",
]
