"""Whether the later gates are asked for predictions, and what a step shows of them.

Asking costs compute in every layer, so that a policy may decline (`Policy.wants_predictions`). The
answer is kept in the cache from one step to the next: a live run has to know it before the layer's
gate has run, and two clocks must not come to two answers.
"""

from __future__ import annotations

from moepolicy.policy import Policy
from moepolicy.state import Cache
from moepolicy.steps import Step, without_predictions


def as_asked(cache: Cache, step: Step) -> Step:
    """``step`` without the predictions that the policy has declined, if a trace has them."""
    if cache.declining and cache.asks[step.layer] == 0:
        return without_predictions(step)
    return step


def ask_ahead(cache: Cache, policy: Policy, layer: int) -> None:
    """Note whether the next layer's step is to have predictions; the first follows the last."""
    if not cache.declining:
        return
    following = layer + 1 if layer + 1 < len(cache.asks) else 0
    cache.asks[following] = 1 if policy.wants_predictions(following) else 0
