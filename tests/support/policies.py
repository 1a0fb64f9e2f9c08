"""Policies that tests load from this file by path."""

from __future__ import annotations

from typing import Any

from moepolicy import Context, Policy, find_policy
from moepolicy.composite import Composite
from moepolicy.speculation import NextGate


class SlotSpec(Policy):
    """Prefetches straight into cache slots and declines some evictions: a far corner."""

    requires = frozenset({"predictions"})
    stage_prefetches = False
    staging = 2

    def __init__(self, context: Context) -> None:
        self.n_experts = context.n_experts
        self.n_keys = context.n_experts * context.n_layers

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return -1 if incoming % 3 == 0 else int(candidates[incoming % len(candidates)])

    def retain(self, layer: int, key: int, candidates: Any) -> int:
        return -1 if key % 2 else int(candidates[0])

    def prefetch(self, step: Any, keys: Any) -> int:
        for i in range(min(3, self.n_keys)):
            keys[i] = ((step.layer + 1) * self.n_experts + i) % self.n_keys
        return min(3, self.n_keys)


class Guessing(Composite):
    """Any eviction with the next gate's guesses, in staging buffers or straight in slots."""

    requires = frozenset({"predictions"})

    def __init__(self, context: Context, eviction: str, staging: int = 0) -> None:
        super().__init__(find_policy(eviction).build(context), NextGate(context, 2))
        self.staging = max(staging, 1)
        self.stage_prefetches = staging > 0


class Broken(Policy):
    """Misbehaves in one hook."""

    def __init__(self, context: Context, how: str = "raise") -> None:
        self.how = how

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        if self.how == "raise":
            raise RuntimeError("my victim table is empty")
        return {"pinned": incoming, "beyond": 10_000}[self.how]

    def prefetch(self, step: Any, keys: Any) -> int:
        keys[0] = 10_000 if self.how == "prefetch" else 0
        return 1
