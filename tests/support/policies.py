"""Policies that tests load from this file by path."""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import Context, Policy, find_policy
from moepolicy.composite import Composite
from moepolicy.kinds import COMPUTE, LOAD, LOW, SKIP, SUBSTITUTE
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


class Anything(Policy):
    """Whatever can become of a miss, in turns that no pattern of the trace follows."""

    requires = frozenset({"cpu", "low"})
    lossy = True

    def __init__(self, context: Context, seed: int = 0) -> None:
        self.state = np.array([seed % 1_000_000 + 1], np.int64)

    def draw(self, n: int) -> int:
        self.state[0] = self.state[0] * 48271 % 2_147_483_647
        return int(self.state[0] // 8 % n)

    def on_miss(self, step: Any, rank: int) -> int:
        answer = self.draw(6)
        if answer == 0:
            return COMPUTE
        if answer == 1:
            return SKIP
        if answer == 2:
            return SUBSTITUTE
        return LOAD if answer == 3 else LOW

    def precision(self, step: Any, rank: int) -> int:
        return LOAD if self.draw(3) == 0 else LOW

    def substitute(self, step: Any, rank: int, candidates: Any) -> int:
        chosen = self.draw(len(candidates) + 1)
        return -1 if chosen == len(candidates) else int(candidates[chosen])

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        chosen = self.draw(len(candidates) + 1)
        return -1 if chosen == len(candidates) else int(candidates[chosen])


class AnythingAhead(Anything):
    """The same with guesses, straight into slots, of what it may then leave out."""

    stage_prefetches = False

    def __init__(self, context: Context, seed: int = 0) -> None:
        self.state = np.array([seed % 1_000_000 + 1], np.int64)
        self.n_keys = context.n_keys

    def prefetch(self, step: Any, keys: Any) -> int:
        for i in range(min(3, self.n_keys)):
            keys[i] = (step.experts[0] + self.draw(self.n_keys)) % self.n_keys
        return min(3, self.n_keys)


class AnythingStaged(AnythingAhead):
    """The same with guesses that wait in staging buffers."""

    stage_prefetches = True
    staging = 2


class Answers(Policy):
    """One answer to every miss, whether it is one or not; the lowest candidate stands in."""

    lossy = True

    def __init__(self, context: Context, answer: int = 0, other: int = LOW, who: int = -2) -> None:
        self.answer = answer
        self.other = other
        self.who = who

    def on_miss(self, step: Any, rank: int) -> int:
        return self.answer

    def precision(self, step: Any, rank: int) -> int:
        return self.other

    def substitute(self, step: Any, rank: int, candidates: Any) -> int:
        return int(candidates[0]) if self.who == -2 else self.who

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


class AnswersLow(Answers):
    """The same where there is a store of lower precision."""

    requires = frozenset({"low", "cpu"})
