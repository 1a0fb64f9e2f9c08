"""What a run has counted: once, under one name, for every report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from moepolicy import Counts, Event, ExpertCache, Kind, counts_of, find_policy
from moepolicy.counts import MASSES, CountColumns, as_row, columns
from moeroute import open_trace
from moesim import Result, load_workload

OWN = Path(__file__).parents[1] / "support" / "policies.py"
COUNTERS = [
    *("requests", "hits", "late", "misses", "loads", "bypasses", "prefetches"),
    *("useless_prefetches", "cpu_experts", "low_loads", "substituted", "skipped", "rerouted"),
]
SHARES = ["skipped_share", "substituted_share", "low_share", "rerouted_share"]


@dataclass(frozen=True, kw_only=True)
class Summed(Counts):
    """Counts with a sum of their own, as a runtime has."""

    stall_s: float = 0.0


def test_the_columns_are_those_there_have_always_been() -> None:
    assert list(columns(CountColumns)) == [*COUNTERS, *SHARES]
    assert set(MASSES.values()) == set(SHARES)
    found = columns(Result)
    assert list(found) == [
        *("policy", "slots", "scope", "machine", "trace", "expert_bytes", "low_expert_bytes"),
        *("layer_bytes", "token_bytes", "dense_precision", "time_is_lower_bound", "steps"),
        *COUNTERS,
        *SHARES,
        *(
            "bytes_loaded",
            "hit_ratio",
            "time_s",
            "stall_s",
            "link_busy_s",
            "gates_s",
            "tokens_per_s",
        ),
        *("cold", "shares_slots", "lossy", "limit_loads", "limit_loads_kept"),
        "limit_tokens_per_s",
        *("limit_buffers", "share_of_limit"),
    ]
    assert (found["hits"], found["low_share"], found["bytes_loaded"]) == (int, float, int)
    assert (found["dense_precision"], found["cold"], found["time_s"]) == (str, bool, float)


@pytest.mark.parametrize("policy", ["lru-spec", f"{OWN}:Anything"])
def test_counts_are_of_the_decisions(policy: str) -> None:
    spec = find_policy(policy)
    workload = load_workload(open_trace("tiny"), predictions=True, logits=True).head(40)
    told: Counter[Kind] = Counter()

    def tell(event: Event) -> None:
        told[event.kind] += 1

    context = workload.context(3, "layer")
    cache = ExpertCache(context, spec.build(context), observers=[tell])
    halfway = Counts()
    for number in range(workload.n_steps):
        if number == workload.n_steps // 2:
            halfway = counts_of(cache.arrays)
        run_step(cache, workload.step(number))
    found = counts_of(cache.arrays)
    assert found.hits == told[Kind.HIT] > 0
    assert found.requests == told[Kind.HIT] + told[Kind.LATE] + told[Kind.MISS]
    assert found.loads == told[Kind.LOAD] + told[Kind.SPECULATE] > found.prefetches
    assert found.prefetches == told[Kind.SPECULATE]
    assert found.useless_prefetches == told[Kind.USELESS]
    assert (found.cpu_experts, found.skipped) == (told[Kind.COMPUTE], told[Kind.SKIP])
    assert (found.low_loads, found.substituted) == (told[Kind.LOW], told[Kind.SUBSTITUTE])
    assert 0 < halfway.requests < found.requests
    later = found.since(halfway)
    assert (halfway + later).requests == found.requests
    assert later.requests == found.requests - halfway.requests
    if cache.arrays.choosing:
        assert found.skipped > 0
        assert found.skipped_share == cache.arrays.mass[1] / cache.arrays.mass[0] > 0
    else:
        assert not any(found.shares.values())


def run_step(cache: ExpertCache, step: Any) -> None:
    """Every copy arrives at once."""
    outcome = dict(zip(step.experts.tolist(), cache.begin(step).tolist(), strict=True))
    while copy := cache.start():
        cache.finish(copy.key)
    for key, kind in outcome.items():
        if kind in (Kind.HIT, Kind.LATE, Kind.MISS, Kind.SUBSTITUTE):
            cache.consume(key)
    cache.end()


def test_shares_ratios_and_bytes() -> None:
    counts = Counts(
        requests=8, hits=4, late=2, misses=2, loads=3, low_loads=1, cpu_experts=1,
        gate_mass=4.0, skipped_mass=1.0, low_mass=2.0,
    )  # fmt: skip
    assert (counts.hit_ratio, counts.late_ratio, counts.miss_ratio) == (0.5, 0.25, 0.25)
    assert counts.cpu_ratio == counts.ratio(1) == 0.125
    assert counts.shares == {
        "skipped_share": 0.25,
        "substituted_share": 0.0,
        "low_share": 0.5,
        "rerouted_share": 0.0,
    }
    assert counts.bytes_over_link(100, 10) == 2 * 100 + 10
    assert Counts().hit_ratio == Counts().skipped_share == 0.0
    row = as_row(counts)
    assert row["low_share"] == 0.5
    assert "gate_mass" not in row


def test_a_subclass_s_own_sums_are_added_too() -> None:
    first, second = Summed(hits=1, requests=2, stall_s=0.5), Summed(hits=2, requests=2, stall_s=1.0)
    both = first + second
    assert both == Summed(hits=3, requests=4, stall_s=1.5)
    assert both.since(first) == second
    assert "stall_s" not in both.counted()
    assert set(both.counted()) == {one.name for one in fields(CountColumns)}
