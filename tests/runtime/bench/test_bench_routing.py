"""Policies that route in a bench: by the recorded logits and the rule of the recorded gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moepolicy import PolicyError, RoutingRule, find_policy
from moepolicy.refusals import Refusals
from moeroute import open_trace
from moerun.bench import report
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.routing import UNIFORM, load_routing
from moerun.bench.run import Bench
from moerun.bench.schedule import BenchSchedule
from moerun.errors import RunError, UsageError
from moerun.settings import Settings
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.result import Result
from moesim.simulation import simulate
from moesim.workload.loading import load_workload
from support.traces import random_trace

OWN = Path(__file__).parents[2] / "support" / "routing.py"
NAMES = [f"{OWN}:ToResidents:bias=2.0", f"{OWN}:ByToken", f"{OWN}:Kept"]
WARM_UP, TOKENS, SLOTS = 3, 8, 3
SIZE = {"layers": 8, "experts": 8, "top_k": 2}


@pytest.mark.slow
def test_a_bench_routes_as_the_simulator_does(tmp_path: Path) -> None:
    policies = tuple(find_policy(name) for name in NAMES)
    schedule = BenchSchedule(policies, TOKENS, WARM_UP, 1, released=False)
    routing = load_routing("tiny", **SIZE, tokens=schedule.forced_tokens)
    assert routing.weight_rule == RoutingRule("softmax-topk-renorm")
    assert routing.token_ids is not None
    assert len(routing.token_ids) == schedule.forced_tokens
    assert schedule.within(routing, {}) == schedule
    # Gates in bfloat16: a policy is shown the logits that were recorded.
    model = GeneratedModel(find_config("tiny"), name="tiny", precision="bf16", seed=0)
    with Bench(model, routing, Settings(policies[0], slots=SLOTS), schedule) as bench:
        bench.run()
        routing.write_trace(tmp_path / "forced.parquet", model.index)
        rows = {row.policy: row for row in report.rows_of(bench, {})}
        printed = report.table_of([*rows.values()], report.provenance(bench))
    trace = open_trace(tmp_path / "forced.parquet")
    assert (trace.meta.weight_rule, trace.meta.weight_scale) == routing.weight_rule
    workload = load_workload(trace, logits=True, token_ids=True, rows=True)
    machine = Machine("any", "", "published", LinkProfile(1e9), Compute(layer_s=1e-3))

    def simulated(name: str, tokens: int) -> Result:
        some = workload.head(tokens)
        return simulate(some, find_policy(name), machine, slots=SLOTS, expert_bytes=4096)

    for name in NAMES:
        warm, whole = (simulated(name, n) for n in (1 + WARM_UP, schedule.forced_tokens))
        [run] = bench.results.runs[name]
        for counter in ("hits", "misses", "requests", "rerouted"):
            expected = getattr(whole, counter) - getattr(warm, counter)
            assert getattr(run.totals, counter) == expected, (name, counter)
        assert rows[name].rerouted_share == run.totals.rerouted_share
        assert (run.totals.rerouted > 0) is not name.endswith("Kept")
    assert printed.count("routed to another expert") >= 2


def test_routing_without_logits_is_forced_by_weights_and_ids() -> None:
    """As recordings of others have it: what policies decide is the same."""
    policies = tuple(find_policy(name) for name in ("lru", "lfu"))
    schedule = BenchSchedule(policies, TOKENS, WARM_UP, 1, released=False)
    whole = load_routing("tiny", **SIZE, tokens=schedule.forced_tokens)
    bare = replace(whole, logits=None, weight_rule=None)
    assert bare.sha256 != whole.sha256
    np.testing.assert_array_equal(bare.counts(), whole.counts())
    made = {}
    for routing in (whole, bare):
        model = GeneratedModel(find_config("tiny"), name="tiny", precision="fp32", seed=0)
        with Bench(model, routing, Settings(policies[0], slots=SLOTS), schedule) as bench:
            bench.run()
            made[routing.sha256] = {
                name: [(run.totals.hits, run.totals.misses, bench.last_ids) for run in runs]
                for name, runs in bench.results.runs.items()
            }
    assert made[bare.sha256] == made[whole.sha256]
    refused: Refusals = {}
    reading = (find_policy(f"{OWN}:ToResidents:bias=2.0"), *policies)
    assert replace(schedule, policies=reading).within(bare, refused).policies == policies
    assert "reads the gates' logits, and routing 'tiny' has none" in str(*refused.values())


def test_a_trace_of_another_top_k_is_forced_with_top_k(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    random_trace(path, n_tokens=20, n_layers=8, n_experts=8, top_k=3)
    with pytest.raises(RunError, match=r"top-3 of 8 experts, .* top-2 of 8: give --top-k 3, or"):
        load_routing(str(path), **SIZE, tokens=4)
    routing = load_routing(str(path), **{**SIZE, "top_k": 3}, tokens=4)
    assert routing.logits is None
    assert routing.ids.shape == (4, 8, 3)
    config = find_config("tiny", top_k=3)
    assert GeneratedModel(config, name="tiny", precision="fp32", seed=0).index.top_k == 3
    for wrong in (0, 9):
        with pytest.raises(UsageError, match=f"must be 1 to 8, not {wrong}"):
            find_config("tiny", top_k=wrong)


def test_what_a_routing_lacks_is_said_of_the_policies_that_need_it() -> None:
    policies = tuple(find_policy(name) for name in [*NAMES, "lru"])
    schedule = BenchSchedule(policies, TOKENS, WARM_UP, 1, released=False)
    refused: Refusals = {}
    drawn = load_routing(UNIFORM, **SIZE, tokens=schedule.forced_tokens)
    assert drawn.weight_rule == RoutingRule("softmax-topk-renorm")
    left = schedule.within(drawn, refused)
    assert [policy.label for policy in left.policies] == [NAMES[0], NAMES[2], "lru"]
    assert "reads the tokens' ids, and routing 'uniform' has none" in str(refused[NAMES[1]])
    refused.clear()
    unknown = replace(drawn, weight_rule=None, token_ids=np.zeros(drawn.tokens, np.int32))
    left = schedule.within(unknown, refused)
    assert [policy.label for policy in left.policies] == ["lru"]
    for name in NAMES:
        assert "make their weights by none of the rules known: softmax" in str(refused[name])
        assert "\n" not in str(refused[name])
    with pytest.raises(PolicyError, match="none of the rules known"):
        replace(schedule, policies=policies[:1]).within(unknown, {})
