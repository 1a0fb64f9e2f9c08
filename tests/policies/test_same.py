"""Policies that cannot differ from another in a kind of cache say so, and do not differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from moepolicy import find_policy, policy_names
from moesim.engines import choose
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import Cpu
from support.machines import machine
from support.workloads import make_workload

LAYERS, EXPERTS, TOP_K = 3, 6, 2
SETTINGS = [(scope, slots) for scope in ("layer", "global") for slots in (0, 1, 2, 3, 5, 6, 9)]
# Lossy ones hang on weights and logits, which the traces below do not have as a model has them.
NAMES = [name for name in policy_names() if not find_policy(name).policy.lossy]


def random_workload(seed: int) -> Any:
    """Three texts of decoded tokens with some prompts among them, of skewed popularity."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(EXPERTS), LAYERS)
    demands, tokens = [], []
    for _ in range(60):
        prompt = rng.random() < 0.1
        for layer in range(LAYERS):
            n = int(rng.integers(TOP_K, EXPERTS + 1)) if prompt else TOP_K
            chosen = rng.choice(EXPERTS, n, replace=False, p=share[layer]).tolist()
            demands.append((layer, chosen))
            tokens.append(3 if prompt else 1)
    workload = make_workload(demands, LAYERS, EXPERTS, tokens=tokens, foreseen=True)
    return replace(workload, starts=np.arange(3) * 20 * LAYERS)


def figures(workload: Any, name: str, scope: str, slots: int) -> Any:
    """Counters and times of a run."""
    spec = find_policy(name)
    on = replace(machine(latency_s=3e-9), cpu=Cpu(workers=1))
    costs = costs_of(workload, on, Sizes(10, 5, 3, 2), predicting="predictions" in spec.requires)
    context = workload.context(slots, scope)
    cache, clock = choose.run(
        workload, spec, context, costs, compilations=Compilations(), engine=Engine.replay
    )
    return cache.counters.tolist(), clock.total_ns, clock.stall_ns


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "slots"), SETTINGS)
def test_what_cannot_differ_does_not(scope: str, slots: int) -> None:
    claimed = 0
    for seed in range(4):
        workload = random_workload(seed)
        context = workload.context(slots, scope)
        found: dict[str, Any] = {}

        def figures_of(name: str, workload: Any = workload, found: Any = found) -> Any:
            if name not in found:
                found[name] = figures(workload, name, scope, slots)
            return found[name]

        for name in NAMES:
            same = find_policy(name).policy.same_as(context)
            if same is not None:
                claimed += same.policy != name
                assert figures_of(name) == figures_of(same.policy), (name, same)
    # Were nothing claimed, nothing would be tested: a cache of all experts, or of one token's.
    trivial = slots >= EXPERTS or (scope == "layer" and slots <= TOP_K)
    assert claimed > 4 if trivial else claimed == 4


@pytest.mark.slow
def test_what_is_not_claimed_to_be_the_same_differs() -> None:
    """At half of the experts every two policies differ somewhere, but for those that say not."""
    figures_of = {
        (name, scope): [figures(random_workload(seed), name, scope, 3) for seed in range(4)]
        for name in NAMES
        for scope in ("layer", "global")
    }
    for scope in ("layer", "global"):
        context = random_workload(0).context(3, scope)
        alike = {
            (one, other)
            for i, one in enumerate(NAMES)
            for other in NAMES[i + 1 :]
            if figures_of[one, scope] == figures_of[other, scope]
        }
        told = {("fifo", "least-stale") if scope == "layer" else ("lru", "adapmoe-slots")}
        assert alike == told
        same = find_policy("least-stale").policy.same_as(context)
        assert (same.policy if same else None) == ("fifo" if scope == "layer" else None)
