"""The policies that research.py races: what is published, and this project's own."""

from __future__ import annotations

from functools import cache
from typing import Any

from moepolicy import find_policy
from moepolicy.library import BUILT_IN

# What is published, runs online and is lossless, with the parameters that it is tuned by: each
# trace and size takes the best of them with hindsight, which favours them.
TUNED = {
    "class-lru": ("half_life", (16, 64, 128)),
    "slru": ("protected", (0.5, 0.8)),
    "lru-spec": ("n", (1, 2)),
}
OURS = ("foresight", "foresight-bypass", "foresight-ahead", "foresight-spec")


def variants(policy: str) -> list[str]:
    """A published policy with the values that it is tuned by, its defaults among them."""
    if policy not in TUNED:
        return [policy]
    parameter, values = TUNED[policy]
    return [f"{policy}:{parameter}={value}" for value in values]


def published(*, prefetching: bool) -> list[str]:
    """All lossless online policies but ours; ``prefetching``: those that do so, too."""
    found = []
    for name, policy in BUILT_IN.items():
        needs = find_policy(name).requires
        if policy.lossy or name in OURS or needs & {"future", "cpu", "low", "counts"}:
            continue
        if prefetching or "prefetch" not in hooks_of(policy):
            found += variants(name)
    return found


def predicts(policy: str) -> bool:
    """Whether a policy reads what later gates predict."""
    return "predictions" in find_policy(policy).requires


def hooks_of(policy: type[Any]) -> set[str]:
    """The names that a class or one above it defines, but for the interface's own."""
    return {name for cls in policy.__mro__[:-2] for name in vars(cls)}


@cache
def rivals() -> tuple[str, ...]:
    """Published policies that only evict."""
    return tuple(published(prefetching=False))
