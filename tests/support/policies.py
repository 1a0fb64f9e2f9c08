"""Policies that tests load from this file by path."""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import Context, Policy, find_policy
from moepolicy.composite import Composite
from moepolicy.kinds import COMPUTE, LOAD, LOW, SKIP, SUBSTITUTE
from moepolicy.library.gate.next_gate import NextGate


class AnyVictim(Policy):
    """Evicts by the key that comes, and declines some."""

    def __init__(self, context: Context) -> None:
        self.gone = np.zeros(1, np.int64)

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return -1 if incoming % 5 == 4 else int(candidates[incoming % len(candidates)])

    def on_evict(self, key: int) -> None:
        self.gone[0] += key


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


class Sharing(AnyVictim):
    """Layers share the slots unequally: each takes what it can of what is left, the last first."""

    @classmethod
    def share_slots(cls, total: int, context: Context) -> Any:
        shares = np.zeros(context.n_layers, np.int64)
        for layer in reversed(range(context.n_layers)):
            # Another order at each size, so that a resize takes from one layer for another.
            at = (layer + context.slots) % context.n_layers
            shares[at] = min(total - shares.sum(), context.n_experts)
        return shares


class SharingAhead(Sharing):
    """The same with guesses, straight into slots."""

    stage_prefetches = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.n_experts = context.n_experts
        self.n_keys = context.n_keys

    def prefetch(self, step: Any, keys: Any) -> int:
        for i in range(min(3, self.n_keys)):
            keys[i] = ((step.layer + 1) * self.n_experts + i) % self.n_keys
        return min(3, self.n_keys)


class Declining(AnyVictim):
    """Fetches by predictions, which it wants now and then, and remembers what it was shown."""

    requires = frozenset({"predictions"})

    def __init__(self, context: Context, seed: int = 0) -> None:
        super().__init__(context)
        self.n_experts = context.n_experts
        self.n_layers = context.n_layers
        self.state = np.array([seed % 1_000_000 + 1], np.int64)
        self.shown = np.zeros(3, np.int64)

    def on_step(self, step: Any) -> None:
        self.shown[len(step.predicted)] += 1
        self.state[0] = (self.state[0] * 48271 + step.layer + step.hits) % 2_147_483_647

    def prefetch(self, step: Any, keys: Any) -> int:
        if len(step.predicted) == 0 or np.isnan(step.predicted[0, 0]):
            return 0
        best = 0
        for e in range(self.n_experts):
            if step.predicted[0, e] > step.predicted[0, best]:
                best = e
        keys[0] = (step.layer + 1) % self.n_layers * self.n_experts + best
        return 1

    def wants_predictions(self, layer: int) -> bool:
        return bool((self.state[0] // 8 + layer) % 3 > 0)


class Knowing(AnyVictim):
    """Evicts by what it is told of the machine and the experts."""

    requires = frozenset({"speed", "bytes"})

    def __init__(self, context: Context) -> None:
        assert context.copy_over_layer > 0
        assert context.expert_bytes is not None
        super().__init__(context)
        self.from_end = context.copy_over_layer * context.expert_bytes > 1.0

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[-1] if self.from_end else candidates[0])


class WrongShares(AnyVictim):
    """Shares that no cache can have, one way or another by the slots a layer."""

    @classmethod
    def share_slots(cls, total: int, context: Context) -> Any:
        n = context.n_layers
        if context.slots == 0:
            raise RuntimeError("no slots to share")
        return {
            1: [total // n] * (n - 1) + [total // n + 1],
            2: [total / n] * n,
            3: [-1] + [context.n_experts] * (n - 1),
            4: [[total]],
        }[context.slots]


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


class Rerouting(AnythingStaged):
    """Gives tokens other experts as well, residents more often, and looks at all that it may."""

    requires = frozenset({"cpu", "low", "tokens"})

    def __init__(self, context: Context, seed: int = 0) -> None:
        self.state = np.array([seed % 1_000_000 + 1], np.int64)
        self.n_keys = context.n_keys
        self.seen = np.zeros(8, np.int64)

    def on_step(self, step: Any) -> None:
        self.seen[0] += step.begins_pass
        self.seen[1] += step.begins_sequence
        for i in range(len(step.token_ids)):
            self.seen[2] = (self.seen[2] * 31 + step.token_ids[i] + 1) % 1_000_003
        self.seen[3] += step.hits + 3 * step.late + 5 * step.misses + 7 * step.backlog
        self.state[0] = (self.state[0] + self.seen[3]) % 2_147_483_646 + 1

    def route(self, step: Any, row: int, resident: Any, chosen: Any) -> None:
        n = len(resident)
        self.seen[4] += row
        if self.draw(2) == 0 or len(chosen) == n:
            return
        wanted = self.draw(n)
        for e in range(n):
            other = (wanted + e) % n
            taken = False
            for i in range(len(chosen)):
                taken = taken or chosen[i] == other
            if not taken and (resident[other] or step.logits[other] > 0):
                chosen[self.draw(len(chosen))] = other
                return


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


class Filling(SlotSpec):
    """The same with guesses that go to free slots, and to staging buffers where there is none."""

    stage_prefetches = True
    fills_slots = True
