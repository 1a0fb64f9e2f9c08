"""Policies made of others: each part decides an aspect, and every part is told of everything.

Who answers is decided by the class, so that compiled code has no branch for it: `composite_class`
makes the class for what a part takes over, `only_class` that of one aspect of a policy.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.aspects import aspects_of, declared, name_of
from moepolicy.policy import Policy
from moepolicy.steps import Step


class MadeOfTwo(Policy):
    """Two policies as one, both told of everything: ``base`` says which expert goes."""

    def __init__(self, base: Policy, part: Policy) -> None:
        self.base = base
        self.part = part
        self.staging = max(base.staging, part.staging)
        prefetcher = part if "prefetching" in aspects_of(type(part)) else base
        self.stage_prefetches = prefetcher.stage_prefetches
        self.fills_slots = prefetcher.fills_slots
        self.base_reads = "predictions" in base.requires
        self.part_reads = "predictions" in part.requires

    @property
    def parts(self) -> tuple[Policy, Policy]:
        """What it is made of."""
        return self.base, self.part

    def on_step(self, step: Step) -> None:
        """Tell both."""
        self.base.on_step(step)
        self.part.on_step(step)

    def on_hit(self, key: int, now: int) -> None:
        """Tell both."""
        self.base.on_hit(key, now)
        self.part.on_hit(key, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Tell both."""
        self.base.on_load(key, speculative, now)
        self.part.on_load(key, speculative, now)

    def on_evict(self, key: int) -> None:
        """Tell both."""
        self.base.on_evict(key)
        self.part.on_evict(key)

    def on_resize(self, slots: int) -> None:
        """Tell both."""
        self.base.on_resize(slots)
        self.part.on_resize(slots)

    def wants_predictions(self, layer: int) -> bool:
        """Whether one that reads predictions wants them."""
        if self.base_reads and self.base.wants_predictions(layer):
            return True
        return self.part_reads and self.part.wants_predictions(layer)

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The base's answer."""
        return self.base.victim(layer, incoming, candidates)

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The base's answer."""
        return self.base.retain(layer, key, candidates)


class PrefetchesByPart(MadeOfTwo):
    """The part says what to fetch ahead."""

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The part's answer."""
        return self.part.prefetch(step, keys)


class AnswersMissesByPart(MadeOfTwo):
    """The part says what becomes of a miss."""

    def on_miss(self, step: Step, rank: int) -> int:
        """The part's answer."""
        return self.part.on_miss(step, rank)

    def precision(self, step: Step, rank: int) -> int:
        """The part's answer."""
        return self.part.precision(step, rank)

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The part's answer."""
        return self.part.substitute(step, rank, candidates)


class RoutesByPart(MadeOfTwo):
    """The part says which experts a token gets."""

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The part's choice."""
        self.part.route(step, row, resident, chosen)


class PrefetchesByBase(MadeOfTwo):
    """The base says what to fetch ahead."""

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The base's answer."""
        return self.base.prefetch(step, keys)


class AnswersMissesByBase(MadeOfTwo):
    """The base says what becomes of a miss."""

    def on_miss(self, step: Step, rank: int) -> int:
        """The base's answer."""
        return self.base.on_miss(step, rank)

    def precision(self, step: Step, rank: int) -> int:
        """The base's answer."""
        return self.base.precision(step, rank)

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The base's answer."""
        return self.base.substitute(step, rank, candidates)


class RoutesByBase(MadeOfTwo):
    """The base says which experts a token gets."""

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The base's choice."""
        self.base.route(step, row, resident, chosen)


Composite = PrefetchesByPart
"""An eviction rule and a prefetcher: the form in which most published policies come."""

_BY_PART: dict[str, type[MadeOfTwo]] = {
    "prefetching": PrefetchesByPart,
    "misses": AnswersMissesByPart,
    "routing": RoutesByPart,
}
_BY_BASE: dict[str, type[MadeOfTwo]] = {
    "prefetching": PrefetchesByBase,
    "misses": AnswersMissesByBase,
    "routing": RoutesByBase,
}


@cache
def composite_class(base: Any, part: Any) -> type[MadeOfTwo]:
    """The class whose objects are made of one of the class ``base`` and one of ``part``.

    ``part`` decides nothing that ``base`` does.
    """
    takes = [cls for aspect, cls in _BY_PART.items() if aspect in aspects_of(part)]
    takes += [cls for aspect, cls in _BY_BASE.items() if aspect in aspects_of(base)]
    return type(name_of(base, part), tuple(takes) or (MadeOfTwo,), declared(base, part))


class Only(Policy):
    """One aspect of a policy that decides more: ``whole`` is told of everything."""

    def __init__(self, whole: Policy) -> None:
        self.whole = whole
        self.staging = whole.staging
        self.stage_prefetches = whole.stage_prefetches
        self.fills_slots = whole.fills_slots

    def on_step(self, step: Step) -> None:
        """Tell it."""
        self.whole.on_step(step)

    def on_hit(self, key: int, now: int) -> None:
        """Tell it."""
        self.whole.on_hit(key, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Tell it."""
        self.whole.on_load(key, speculative, now)

    def on_evict(self, key: int) -> None:
        """Tell it."""
        self.whole.on_evict(key)

    def on_resize(self, slots: int) -> None:
        """Tell it."""
        self.whole.on_resize(slots)

    def wants_predictions(self, layer: int) -> bool:
        """The whole policy's answer."""
        return self.whole.wants_predictions(layer)


class OnlyEviction(Only):
    """Which expert goes."""

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The whole policy's answer."""
        return self.whole.victim(layer, incoming, candidates)

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The whole policy's answer."""
        return self.whole.retain(layer, key, candidates)


class OnlyPrefetching(Only):
    """What to fetch ahead."""

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """The whole policy's answer."""
        return self.whole.prefetch(step, keys)


class OnlyMisses(Only):
    """What becomes of a miss."""

    def on_miss(self, step: Step, rank: int) -> int:
        """The whole policy's answer."""
        return self.whole.on_miss(step, rank)

    def precision(self, step: Step, rank: int) -> int:
        """The whole policy's answer."""
        return self.whole.precision(step, rank)

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The whole policy's answer."""
        return self.whole.substitute(step, rank, candidates)


class OnlyRouting(Only):
    """Which experts a token gets."""

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """The whole policy's choice."""
        self.whole.route(step, row, resident, chosen)


class OnlySharing(Only):
    """How many slots each layer has: `moepolicy.sharing` asks the class of the whole policy."""


_ONLY: dict[str, type[Only]] = {
    "eviction": OnlyEviction,
    "prefetching": OnlyPrefetching,
    "misses": OnlyMisses,
    "routing": OnlyRouting,
    "sharing": OnlySharing,
}


@cache
def only_class(policy: Any, aspect: str) -> type[Only]:
    """The class of policies that decide one aspect of those that ``policy`` decides."""
    about = declared(policy) | {"only": aspect}
    about["__qualname__"] += f"__{aspect}"
    about["lossy"] = policy.lossy and aspect in ("misses", "routing")
    return type(f"{policy.__name__}_{aspect}", (_ONLY[aspect],), about)
