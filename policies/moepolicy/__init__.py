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

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepolicy.cache import Event as Event
    from moepolicy.cache import ExpertCache as ExpertCache
    from moepolicy.cache import Journal as Journal
    from moepolicy.cache import Transfer as Transfer
    from moepolicy.cache import replay_journal as replay_journal
    from moepolicy.calls import Call as Call
    from moepolicy.composite import Composite as Composite
    from moepolicy.counts import Counts as Counts
    from moepolicy.counts import counts_of as counts_of
    from moepolicy.kinds import Kind as Kind
    from moepolicy.library.clairvoyant.future import next_use as next_use
    from moepolicy.policy import NO_USE as NO_USE
    from moepolicy.policy import Context as Context
    from moepolicy.policy import Policy as Policy
    from moepolicy.policy import PolicyError as PolicyError
    from moepolicy.policy import PolicyFailed as PolicyFailed
    from moepolicy.policy import PolicyUsageError as PolicyUsageError
    from moepolicy.policy import Same as Same
    from moepolicy.registry import find_policy as find_policy
    from moepolicy.registry import policy_names as policy_names
    from moepolicy.routing import WEIGHT_RULES as WEIGHT_RULES
    from moepolicy.routing import RoutingRule as RoutingRule
    from moepolicy.scores import ByScore as ByScore
    from moepolicy.spec import PolicySpec as PolicySpec
    from moepolicy.steps import NO_LOGITS as NO_LOGITS
    from moepolicy.steps import NO_PREDICTIONS as NO_PREDICTIONS
    from moepolicy.steps import NO_TOKEN_IDS as NO_TOKEN_IDS
    from moepolicy.steps import Step as Step
    from moepolicy.steps import TokenRows as TokenRows
    from moepolicy.steps import demand_order as demand_order
    from moepolicy.steps import pool_logits as pool_logits

# Where the names lie. Each is imported when it is first asked for, so that programs start at once.
_LAZY = {
    "ByScore": "moepolicy.scores",
    "Call": "moepolicy.calls",
    "Composite": "moepolicy.composite",
    "Context": "moepolicy.policy",
    "Counts": "moepolicy.counts",
    "Event": "moepolicy.cache",
    "ExpertCache": "moepolicy.cache",
    "Journal": "moepolicy.cache",
    "Kind": "moepolicy.kinds",
    "NO_LOGITS": "moepolicy.steps",
    "NO_PREDICTIONS": "moepolicy.steps",
    "NO_TOKEN_IDS": "moepolicy.steps",
    "NO_USE": "moepolicy.policy",
    "Policy": "moepolicy.policy",
    "PolicyError": "moepolicy.policy",
    "PolicyFailed": "moepolicy.policy",
    "PolicySpec": "moepolicy.spec",
    "PolicyUsageError": "moepolicy.policy",
    "RoutingRule": "moepolicy.routing",
    "Same": "moepolicy.policy",
    "Step": "moepolicy.steps",
    "TokenRows": "moepolicy.steps",
    "Transfer": "moepolicy.cache",
    "WEIGHT_RULES": "moepolicy.routing",
    "counts_of": "moepolicy.counts",
    "demand_order": "moepolicy.steps",
    "find_policy": "moepolicy.registry",
    "next_use": "moepolicy.library.clairvoyant.future",
    "policy_names": "moepolicy.registry",
    "pool_logits": "moepolicy.steps",
    "replay_journal": "moepolicy.cache",
}

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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
