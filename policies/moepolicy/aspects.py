"""What a policy decides: its aspects, of which a composition has one part each."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from moepolicy.policy import Policy, defines

ASPECTS = MappingProxyType(
    {
        "eviction": "victim",
        "prefetching": "prefetch",
        "misses": "on_miss",
        "routing": "route",
        "sharing": "share_slots",
    }
)
"""What one part of a composition decides, by the hook that says so."""


def aspects_of(policy: type[Policy]) -> frozenset[str]:
    """What a class decides, of `ASPECTS`; for one made of others, what these do."""
    if policy.only:
        return frozenset({policy.only})
    if policy.made_of:
        return frozenset().union(*map(aspects_of, policy.made_of))
    return frozenset(aspect for aspect, hook in ASPECTS.items() if defines(policy, hook))


def name_of(*made_of: type[Policy]) -> str:
    """The name of a class made of others."""
    return "_".join(cls.__name__ for cls in made_of)


def declared(*made_of: type[Policy]) -> dict[str, Any]:
    """The declarations of a class made of others, which all of them need."""
    names = [f"{cls.__module__}_{cls.__qualname__}".replace(".", "_") for cls in made_of]
    return {
        "made_of": made_of,
        "requires": frozenset().union(*(cls.requires for cls in made_of)),
        "welcomes": frozenset().union(*(cls.welcomes for cls in made_of)),
        "lossy": any(cls.lossy for cls in made_of),
        "always_evicts": all(cls.always_evicts for cls in made_of if "eviction" in aspects_of(cls)),
        # Compiled code on disk refers to it by this name.
        "__qualname__": "__".join(names),
    }
