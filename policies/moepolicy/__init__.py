"""Policies for caching and prefetching experts, and the one state machine that runs them.

The same policy object, driven by the same functions, decides in the simulator (`moesim`) and in
the live runtime (`moerun`).
"""

from moepolicy.cache import Event, ExpertCache, Journal, Transfer, replay_journal
from moepolicy.calls import Call
from moepolicy.clairvoyant import next_use
from moepolicy.composite import Composite
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
    "demand_order",
    "find_policy",
    "next_use",
    "policy_names",
    "pool_logits",
    "replay_journal",
]
