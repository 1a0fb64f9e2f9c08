"""An arbitrary clock for the state machine: any legal order of starts, arrivals and computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from moepolicy import (
    Context,
    Event,
    ExpertCache,
    Journal,
    Kind,
    RoutingRule,
    Step,
    TokenRows,
    find_policy,
    next_use,
)
from moesim.conformance.clock import RandomClock


class Recording:
    """Everything one run decided."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.journal: Journal = []

    def of_kind(self, *kinds: Kind) -> list[tuple[int, ...]]:
        return [tuple(event) for event in self.events if event.kind in kinds]


def make_steps(
    demands: Sequence[tuple[int, Sequence[int]]],
    n_experts: int,
    predicted: Sequence[Any] | None = None,
) -> list[Step]:
    """Steps from (layer, experts in router order); ``predicted`` is one [h, E] array a step."""
    steps = []
    for number, (layer, experts) in enumerate(demands):
        n = len(experts)
        weights = np.linspace(1.0, 0.5, n, dtype=np.float32)
        guess = np.empty((0, 0), np.float32) if predicted is None else predicted[number]
        keys = np.array(experts, np.int32) + np.int32(layer * n_experts)
        steps.append(Step(number, layer, keys, weights, np.empty(0, np.float32), guess, 1))
    return steps


def context_for(
    steps: Sequence[Step], n_layers: int, n_experts: int, top_k: int, slots: int, scope: str
) -> Context:
    keys = np.concatenate([step.experts for step in steps])
    offsets = np.cumsum([0, *(len(step.experts) for step in steps)])
    counts = np.bincount(keys, minlength=n_layers * n_experts).reshape(n_layers, n_experts)
    return Context(
        n_layers, n_experts, top_k, slots, scope, counts, next_use(keys, offsets), offsets
    )


def drive(
    policy: str,
    context: Context,
    steps: Sequence[Step],
    *,
    seed: int = 0,
    streams: int = 1,
    check: bool = False,
    compile: bool = False,
    resizes: bool = False,
    compile_at: int | None = None,
    rows: Sequence[TokenRows] = (),
) -> tuple[ExpertCache, Recording]:
    """Run ``steps``; a generator seeded with ``seed`` plays the clock (`RandomClock`).

    Calls are compiled from the start, or from amid the step ``compile_at`` on. ``rows`` are those
    of the steps, for a policy that routes.
    """
    seen = Recording()
    horizon = max(len(step.predicted) for step in steps)
    cache = ExpertCache(
        context,
        find_policy(policy).build(context),
        name=policy,
        observers=[seen.events.append],
        journal=seen.journal,
        compile=compile,
        horizon=horizon,
        max_slots=context.n_experts if resizes else None,
        weight_rule=RoutingRule("softmax") if rows else None,
    )

    def begun(number: int) -> None:
        if number == compile_at:
            cache.use(cache.compile_calls(horizon))

    look = cache.check if check else None
    clock = RandomClock(cache, seed, streams=streams, resizes=resizes, look=look, begun=begun)
    none: list[TokenRows | None] = [None] * len(steps)
    clock.run(zip(steps, rows or none, strict=True))
    return cache, seen


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """A small cache and a tie-heavy run of steps: decoded tokens, prompts, gate predictions."""
    n_layers = draw(st.integers(1, 3))
    n_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, n_experts)))
    n_tokens = draw(st.integers(1, 12))
    demands: list[tuple[int, list[int]]] = []
    for _ in range(n_tokens):
        size = top_k if draw(st.integers(0, 4)) else draw(st.integers(top_k, n_experts))
        for layer in range(n_layers):
            order = draw(st.permutations(range(n_experts)))
            demands.append((layer, list(order[:size])))
    horizon = draw(st.integers(1, 2))
    logits = st.integers(-2, 2).map(float)
    predicted = []
    for layer, _ in demands:
        rows = np.full((horizon, n_experts), np.nan, np.float32)
        for ahead in range(min(horizon, n_layers - 1 - layer)):
            rows[ahead] = draw(st.lists(logits, min_size=n_experts, max_size=n_experts))
        predicted.append(rows)
    steps = make_steps(demands, n_experts, predicted)
    scope = draw(st.sampled_from(["layer", "global"]))
    slots = draw(st.integers(0, n_experts))
    return {
        "steps": steps,
        "context": context_for(steps, n_layers, n_experts, top_k, slots, scope),
        "streams": draw(st.integers(1, 3)),
    }
