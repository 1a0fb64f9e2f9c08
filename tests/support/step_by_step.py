"""A cache under one policy, driven a step at a time, every copy done at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from moepolicy import Context, Event, ExpertCache, Kind, RoutingRule, Step, TokenRows, find_policy


class StepByStep:
    """What a policy decides, in keys: ``layer * n_experts + expert``.

    ``loaded``, ``guessed`` and ``evicted`` are the latest step's, in the order of their starts.
    """

    def __init__(self, policy: str, context: Context, *, compile: bool = False) -> None:
        self.context = context
        self.policy: Any = find_policy(policy).build(context)
        self.seen: list[Event] = []
        self.cache = ExpertCache(
            context,
            self.policy,
            observers=[self.seen.append],
            compile=compile,
            horizon=3,
            weight_rule=RoutingRule("softmax"),
        )
        self.number = 0

    def step(
        self,
        experts: Sequence[int],
        layer: int = 0,
        *,
        tokens: int = 1,
        weights: Sequence[float] | None = None,
        logits: Sequence[float] | None = None,
        predicted: Sequence[Sequence[float]] = (),
        chosen: Sequence[Sequence[int]] = (),
        **more: Any,
    ) -> list[str]:
        """Serve ``experts`` of ``layer``, heaviest first; returns the outcomes by name.

        A policy that routes is shown what the gate chose for each token: ``experts`` for the one,
        ``chosen`` for several, all with the same logits.
        """
        n = self.context.n_experts
        ahead = np.full((3, n), np.nan, np.float32)
        ahead[: len(predicted)] = predicted or ahead[:0]
        step = Step(
            self.number,
            layer,
            np.array(experts, np.int32) + np.int32(layer * n),
            np.array(weights or np.linspace(1, 0.5, len(experts)), np.float32),
            np.array(logits if logits is not None else [0.0] * n, np.float32),
            ahead,
            tokens,
            **more,
        )
        self.number += 1
        self.seen.clear()
        ids = np.array(chosen or [experts], np.int32)
        rows = TokenRows(
            ids,
            np.tile(step.weights[: ids.shape[1]], (len(ids), 1)),
            np.tile(step.logits, (len(ids), 1)),
        )
        outcome = [Kind(kind).name for kind in self.cache.begin(step, rows).tolist()]
        assert self.cache.step is not None
        step = self.cache.step
        while copy := self.cache.start():
            self.cache.finish(copy.key)
        for key in step.experts.tolist():
            self.cache.consume(key)
        self.cache.end()
        self.cache.check()
        return outcome

    @property
    def demanded(self) -> list[int]:
        """The keys of the latest step, as they were routed, heaviest first."""
        assert self.cache.step is not None
        return [int(key) for key in self.cache.step.experts]

    def of(self, kind: Kind) -> list[int]:
        """The keys of the latest step's events of ``kind``."""
        return [event.key for event in self.seen if event.kind is kind]

    @property
    def loaded(self) -> list[int]:
        """The keys copied because they were missing."""
        return self.of(Kind.LOAD)

    @property
    def guessed(self) -> list[int]:
        """The keys copied ahead."""
        return self.of(Kind.SPECULATE)

    @property
    def evicted(self) -> list[int]:
        """The keys that left their slots."""
        return self.of(Kind.EVICT)

    @property
    def held(self) -> list[int]:
        """The keys on the device now."""
        return [int(key) for key in np.flatnonzero(self.cache.arrays.place >= 0)]
