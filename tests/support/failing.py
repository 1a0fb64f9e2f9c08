"""Policies that fail in one hook, when it is called for the n-th time: until then they are LRU."""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import Context
from moepolicy.kinds import COMPUTE, LOAD, LOW, SUBSTITUTE
from moepolicy.library.recency.lru import Lru


class Failing(Lru):
    """Fails in a hook of a lossless policy, by an error or by an answer that there cannot be."""

    requires = frozenset({"predictions"})

    def __init__(
        self, context: Context, hook: str, at: int = 1, answer: str = "raise", staging: int = 1
    ) -> None:
        super().__init__(context)
        self.hook = hook
        self.at = at
        self.answer = answer
        self.staging = staging
        self.calls: dict[str, int] = {}
        self.context = context

    def due(self, hook: str) -> bool:
        """Whether ``hook``, which is being called, is to fail now; raises if that is how."""
        self.calls[hook] = self.calls.get(hook, 0) + 1
        if hook != self.hook or self.calls[hook] < self.at:
            return False
        if self.answer == "raise":
            raise RuntimeError(f"my {hook} failed")
        return True

    def on_step(self, step: Any) -> None:
        self.due("on_step")

    def on_hit(self, key: int, now: int) -> None:
        self.due("on_hit")
        super().on_hit(key, now)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        self.due("on_load")
        super().on_load(key, speculative, now)

    def on_evict(self, key: int) -> None:
        self.due("on_evict")

    def on_resize(self, slots: int) -> None:
        self.due("on_resize")

    def victim(self, layer: int, incoming: int, candidates: Any) -> Any:
        if self.due("victim"):
            return {"pinned": incoming, "beyond": 10_000, "text": "none"}[self.answer]
        return super().victim(layer, incoming, candidates)

    def retain(self, layer: int, key: int, candidates: Any) -> int:
        return 10_000 if self.due("retain") else int(candidates[0])

    def wants_predictions(self, layer: int) -> bool:
        self.due("wants_predictions")
        return True

    def prefetch(self, step: Any, keys: Any) -> int:
        if self.due("prefetch"):
            keys[0] = 10_000
            return 10_000 if self.answer == "many" else 1
        first = (step.layer + 1) % self.context.n_layers * self.context.n_experts
        keys[0] = first + step.number % self.context.n_experts
        return 1


class FailingRoute(Failing):
    """Fails in ``route``, and leaves the gate's choice as it is until then."""

    requires = frozenset()
    lossy = True

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        if self.due("route"):
            chosen[0] = chosen[1] if self.answer == "twice" else 10_000
        elif self.hook == "route" and self.calls["route"] == self.at - 1:
            chosen[:] = chosen[::-1].copy()  # another order is no other choice


class FailingAnswers(Failing):
    """Fails in what it answers to misses; until then it loads them, at the lower precision where
    it is to be asked whether that will do."""

    requires = frozenset({"low"})
    lossy = True

    def on_miss(self, step: Any, rank: int) -> int:
        if self.due("on_miss"):
            return 99
        return {"substitute": SUBSTITUTE, "precision": LOW}.get(self.hook, LOAD)

    def precision(self, step: Any, rank: int) -> int:
        return 99 if self.due("precision") else LOW

    def substitute(self, step: Any, rank: int, candidates: Any) -> int:
        return 10_000 if self.due("substitute") else -1


class FailingBeside(Failing):
    """Fails while experts of the step are being computed on the CPU."""

    requires = frozenset({"cpu"})

    def on_miss(self, step: Any, rank: int) -> int:
        return COMPUTE if rank % 2 else LOAD


class FailingShares(Failing):
    """Fails where the layers have other numbers of slots than under LRU."""

    @classmethod
    def share_slots(cls, total: int, context: Context) -> Any:
        return total // context.n_layers + np.where(np.arange(context.n_layers) % 2, 1, -1)
