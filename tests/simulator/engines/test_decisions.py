"""Decisions without a clock: those of every clock, compiled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import PolicyError, find_policy
from moepolicy.state import arrays_of
from moeroute import open_trace
from moesim import load_workload
from moesim.engines import choose as engines
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.engines.timeless import decisions
from moesim.machine.costs import Sizes, costs_of
from support.machines import machine
from support.traces import traces, write_trace
from support.workloads import make_workload

OWN = Path(__file__).parents[2] / "support" / "policies.py"


def state(cache: Any) -> Any:
    return {name: array.tolist() for name, array in arrays_of(cache).items()}


@pytest.mark.parametrize("policy", ["lru", "arc", "s3-fifo", "belady-bypass"])
@given(traces(), st.sampled_from(["layer", "global"]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_without_prefetching_they_are_the_replay_s(
    tmp_path_factory: pytest.TempPathFactory, policy: str, case: Any, scope: str
) -> None:
    (tokens, _), n_experts, slots = case
    path = write_trace(tmp_path_factory.mktemp("t") / "t.parquet", tokens, n_experts)
    workload = load_workload(open_trace(path))
    spec, context = find_policy(policy), workload.context(slots, scope)
    timed, _ = engines.run(
        workload,
        spec,
        context,
        costs_of(workload, machine(), Sizes(10, 5, 0, 0), predicting=False),
        compilations=Compilations(),
        engine=Engine.replay,
    )
    alone = decisions(workload, spec, context, compile=False)
    assert alone.counters.tolist() == timed.counters.tolist()
    assert alone.held.tolist() == timed.held.tolist()


GUESSING = f"{OWN}:Guessing:eviction="


# Compiling takes some ten seconds a policy.
@pytest.mark.parametrize(
    "policy",
    [
        "clock",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [
                GUESSING + "arc",
                GUESSING + "s3-fifo",
                "lru",
                "arc",
                "sieve",
                "slru",
                "2q",
                "class-lru",
            ]
        ),
    ],
)
def test_compiled_they_are_the_same(policy: str) -> None:
    workload = load_workload(open_trace("tiny"), predictions=True).head(60)
    for scope, slots in (("layer", 3), ("layer", 1), ("global", 2)):
        spec, context = find_policy(policy), workload.context(slots, scope)
        compiled = decisions(workload, spec, context)
        assert state(compiled) == state(decisions(workload, spec, context, compile=False))


def test_a_guess_that_arrives_at_once_is_a_hit() -> None:
    demands = [(layer, [(token + layer) % 4]) for token in range(6) for layer in range(2)]
    workload = make_workload(demands, 2, 4, foreseen=True)
    cache = decisions(
        workload, find_policy("lru-spec:n=1"), workload.context(1, "layer"), compile=False
    )
    # The second layer is always foreseen; the first never has what it wants in its one slot.
    assert cache.counters[:3].tolist() == [6, 0, 6]


def test_a_policy_that_breaks_the_rules_is_named() -> None:
    workload = make_workload([(0, [0]), (0, [1])], 1, 2)
    broken = find_policy(f"{OWN}:Broken:how=pinned")
    with pytest.raises(PolicyError, match=r"Broken.*not among the candidates"):
        decisions(workload, broken, workload.context(1, "layer"), compile=False)
