"""The replay against SimPy: equal decisions and equal timelines to the nanosecond."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import find_policy, policy_names
from moepolicy.compiled import NotCompilable, compiled_policy
from moepolicy.state import arrays_of
from moeroute import open_trace
from moesim import Machine, load_workload
from moesim.engines import choose as engines
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import Sizes, costs_of
from support.machines import full_machines, machine, machines
from support.traces import traces, write_trace

OWN = Path(__file__).parents[2] / "support" / "policies.py"
OF_ANY_KIND = ("Anything", "AnythingAhead", "AnythingStaged", "Rerouting")
CHOOSING = [f"{OWN}:{name}" for name in OF_ANY_KIND]
POLICIES = [*policy_names(), "lru-spec:n=1,staging=1", f"{OWN}:SlotSpec", *CHOOSING]
POLICIES += [f"{OWN}:Declining", "foresight+foresight-spec.prefetching"]
SHARING = [f"{OWN}:Sharing", f"{OWN}:SharingAhead"]
POLICIES += SHARING
SIZES = Sizes(10, 5, 3, 2, low_bytes=4)


def outcome(
    workload: Any,
    policy: str,
    on: Machine,
    slots: int,
    scope: str,
    engine: str,
    known: Compilations | None = None,
    *,
    timeline: bool = True,
) -> Any:
    """Everything a run ends with: counters, cache, times, timeline."""
    spec = find_policy(policy)
    predicting, routing = "predictions" in spec.requires, spec.routes
    cache, clock = engines.run(
        workload,
        spec,
        workload.context(slots, scope),
        costs_of(workload, on, SIZES, predicting=predicting, routing=routing),
        compilations=known or Compilations(),
        engine=Engine(engine),
        timeline=timeline,
    )
    times = (clock.total_ns, clock.decode_ns, clock.prompt_ns, clock.stall_ns, clock.link_busy_ns)
    arrays = {name: array.tolist() for name, array in arrays_of(cache).items()}
    del arrays["events"], arrays["n_events"]  # only SimPy tells
    return times, arrays, sorted(clock.segments or ())


def load(tmp_path: Path, case: Any) -> tuple[Any, int]:
    (tokens, predicted), n_experts, slots = case
    path = write_trace(tmp_path / "t.parquet", tokens, n_experts, predicted, logits=True)
    workload = load_workload(
        open_trace(path), predictions=True, logits=True, token_ids=True, rows=True
    )
    meta = replace(workload.meta, weight_rule="sigmoid-renorm-scale", weight_scale=2.5)
    return workload.sized(meta), slots


# A second or more a policy: of each kind one is among the fast tests.
FAST = {"lru", "lru-spec", "belady-bypass", "clairvoyant", "hobbit-spec", "fiddler", "daop"}
FAST |= {"cache-conditional", "swapmoe", "adapmoe-slots", "arc", "expertflow"}
CASES = [
    pytest.param(name, marks=[] if name in FAST or name not in policy_names() else pytest.mark.slow)
    for name in POLICIES
]


@pytest.mark.parametrize("policy", CASES)
@given(traces(), machines, st.sampled_from(["layer", "global"]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_replay_is_simpy_to_the_nanosecond(
    tmp_path_factory: pytest.TempPathFactory, policy: str, case: Any, on: Machine, scope: str
) -> None:
    workload, slots = load(tmp_path_factory.mktemp("t"), case)
    simpy = outcome(workload, policy, on, slots, scope, "simpy")
    assert outcome(workload, policy, on, slots, scope, "replay") == simpy
    without = outcome(workload, policy, on, slots, scope, "replay", timeline=False)
    assert without[:2] == simpy[:2], "what no timeline shows is done at once"


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("policy", ["lru-spec:n=1,staging=1", "emoe-substitute"])
def test_the_steps_may_be_read_in_chunks_of_any_size(
    policy: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step gets its own logits and predictions, whichever chunk they come with."""
    workload = load_workload(open_trace("tiny"), predictions=True, logits=True).head(40)
    simpy = outcome(workload, policy, machine(), 4, "layer", "simpy")
    monkeypatch.setattr(engines, "CHUNK", chunk)
    assert outcome(workload, policy, machine(), 4, "layer", "replay") == simpy


# Compiling takes seconds for each policy and set of features: here every feature is on.
@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        "lru-spec",
        "belady-bypass",
        "fiddler",
        *["clock", "sieve", "slru", "2q", "s3-fifo", "arc"],
        *["lfu-aging", "lfru", "least-stale", "class-lru"],
        CHOOSING[1],
        CHOOSING[3],
        SHARING[1],
        f"{OWN}:Declining",
    ],
)
@given(traces(), full_machines, st.sampled_from(["layer", "global"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_compiling_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, policy: str, case: Any, on: Machine, scope: str
) -> None:
    workload, slots = load(tmp_path_factory.mktemp("t"), case)
    interpreted = outcome(workload, policy, on, slots, scope, "replay")
    known = Compilations(worth_compiling=0)
    assert outcome(workload, policy, on, slots, scope, "replay", known) == interpreted
    assert not known.interpreted


def test_a_policy_is_compiled_once_it_pays_and_decides_the_same() -> None:
    workload = load_workload(open_trace("tiny")).head(200)
    on = machine(latency_s=3e-9)
    known = Compilations(worth_compiling=2 * workload.n_steps)
    interpreted = outcome(workload, "lru", on, 3, "layer", "replay", known)
    assert not known.proven
    assert outcome(workload, "lru", on, 3, "layer", "replay", known) == interpreted
    assert known.proven == {(Engine.replay, find_policy("lru").policy)}


def test_every_built_in_policy_is_compilable() -> None:
    context = load_workload(open_trace("tiny")).context(4, "layer")
    for name in policy_names():
        compiled_policy(find_policy(name).build(context))


def test_a_policy_that_does_not_compile_runs_interpreted_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from moepolicy import Policy\n"
        "class Mine(Policy):\n"
        "    def __init__(self, context):\n"
        "        self.order = {}\n"
        "    def on_load(self, key, speculative, now):\n"
        "        self.order[key] = now\n"
        "    def victim(self, layer, incoming, candidates):\n"
        "        return min(candidates.tolist(), key=self.order.get)\n"
    )
    tokens = [(0, 1, [[e], [e]]) for e in (0, 1, 2, 0, 3)]
    path = write_trace(tmp_path / "t.parquet", tokens, 4)
    workload = load_workload(open_trace(path))
    spec = find_policy(f"{mine}:Mine")
    with pytest.raises(NotCompilable):
        compiled_policy(spec.build(workload.context(2, "layer")))

    def run(policy: Any, known: Compilations) -> Any:
        cache, clock = engines.run(
            workload,
            policy,
            workload.context(2, "layer"),
            costs_of(workload, machine(), Sizes(10, 5, 0, 0), predicting=False),
            compilations=known,
        )
        return cache.counters.tolist(), clock.total_ns

    expected = run(find_policy("fifo"), Compilations())
    known = Compilations(worth_compiling=0)
    assert run(spec, known) == run(spec, known) == expected
    assert capsys.readouterr().err.count("runs interpreted") == 1


def test_gate_columns_reach_the_replay_as_they_reach_simpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n_experts, n_layers = 4, 3
    phases = [0, 0, 0, 1, 1, 0, 1]  # two prompts and what was decoded after them
    tokens = [
        (0, phase, [rng.permutation(n_experts)[:2].tolist() for _ in range(n_layers)])
        for phase in phases
    ]
    predicted = rng.normal(size=(len(tokens) * n_layers, n_experts))
    predicted[::n_layers] = np.nan
    path = write_trace(tmp_path / "t.parquet", tokens, n_experts, predicted)
    workload = load_workload(open_trace(path), predictions=True)
    rows = workload.details(0, workload.n_steps).predicted
    for number in range(workload.n_steps):
        np.testing.assert_array_equal(rows[number], workload.step(number).predicted)
    assert np.isfinite(rows).any()
