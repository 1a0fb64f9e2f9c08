"""Policies for caching and prefetching experts, and the one state machine that runs them.

The same policy object, driven by the same functions, decides in the simulator (`moesim`) and in
the live runtime (`moerun`).

    cache = ExpertCache(Context(n_layers=32, n_experts=8, top_k=2, slots=4), policy)

A key is ``layer * n_experts + expert``, an int; slots are per layer. An author writes a `Policy`,
which is told of `Step` after `Step`; PolicyError says what is wrong with one.

NO_USE          int: the next use of an expert that is never used again
NO_LOGITS       float32[0]: the logits of a step whose trace has none
NO_PREDICTIONS  float32[0, 0]: the predictions of a step whose trace has none
Journal         a list of (`Call`, key): what `replay_journal` drives a cache by
"""

from moepolicy.cache import Event, ExpertCache, Journal, Transfer, replay_journal
from moepolicy.calls import Call
from moepolicy.clairvoyant import next_use
from moepolicy.composite import Composite
from moepolicy.counts import Counts, counts_of
from moepolicy.kinds import Kind
from moepolicy.policy import NO_USE, Context, Policy, PolicyError, PolicyUsageError, Same
from moepolicy.registry import PolicySpec, find_policy, policy_names
from moepolicy.steps import NO_LOGITS, NO_PREDICTIONS, Step, demand_order, pool_logits

__all__ = [
    "NO_LOGITS",
    "NO_PREDICTIONS",
    "NO_USE",
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
    "PolicySpec",
    "PolicyUsageError",
    "Same",
    "Step",
    "Transfer",
    "counts_of",
    "demand_order",
    "find_policy",
    "next_use",
    "policy_names",
    "pool_logits",
    "replay_journal",
]
