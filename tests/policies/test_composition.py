"""Policies made of others: parts for aspects, one aspect of a policy, two by a condition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moepolicy import Context, Event, Kind, PolicyUsageError, Step, find_policy
from moepolicy.aspects import aspects_of
from moeroute import open_trace
from moesim import load_machine, simulate, workload_for
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.profile import Cpu
from moesim.workload.steps import Workload

CONTEXT = Context(n_layers=2, n_experts=8, top_k=2, slots=4)
OWN = Path(__file__).parents[1] / "support" / "policies.py"
INTERPRETED = Compilations(worth_compiling=10**12, worth_loading=10**12)


def workload(*policies: str) -> Workload:
    return workload_for(open_trace("tiny"), [find_policy(name) for name in policies]).head(50)


def decisions(policy: str, engine: Engine = Engine.simpy, **options: Any) -> list[Event]:
    told: list[Event] = []
    simulate(
        workload(policy),
        find_policy(policy),
        load_machine("t4"),
        slots=options.get("slots", 3),
        engine=engine,
        low_bytes=10,
        observers=(told.append,),
        compilations=INTERPRETED,
        limits=False,
    )
    return told


@pytest.mark.parametrize(
    ("spec", "label", "requires", "horizon"),
    [
        ("lru+gate", "lru+gate", {"predictions"}, 1),
        ("gate(n=1)+lfu", "lfu+gate(n=1)", {"predictions"}, 1),
        ("lru( )", "lru", set(), 0),
        ("lru-spec(n=3)", "lru-spec:n=3", {"predictions"}, 1),
        (
            "arc+gate+hobbit.misses(high=0.5)",
            "arc+gate+hobbit.misses(high=0.5)",
            {"predictions", "low", "weights"},
            1,
        ),
        (
            "adaptive(lru-spec(n=1), lfu, when=late>0.2, window=64)",
            "adaptive(lru-spec(n=1),lfu,when=late>0.2,window=64)",
            {"predictions"},
            1,
        ),
    ],
)
def test_a_composition_is_named_as_it_is_typed_and_needs_what_its_parts_need(
    spec: str, label: str, requires: set[str], horizon: int
) -> None:
    found = find_policy(spec)
    assert (found.label, set(found.requires), found.horizon) == (label, requires, horizon)
    assert find_policy(found.label) == found
    found.build(CONTEXT)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lru+lfu", "'lru' and 'lfu' both decide eviction"),
        ("lru+gate+gate(n=1)", "'gate' and 'gate:n=1' both decide prefetching"),
        ("lru+gate+fate", "'lru' and 'fate' both decide eviction"),
        ("gate", r"'gate' is a part of a policy: give it after another, lru\+gate"),
        ("gate+hobbit.misses", "none of 'gate' and 'hobbit.misses' decides eviction"),
        ("lru+hobbit.mises", "no aspect 'mises'; did you mean 'misses'"),
        ("lru.misses", "'lru' decides eviction, and not 'misses'"),
        ("lru+", r"policy 'lru\+': give a name on each side of a"),
        ("lru+gats", "unknown policy 'gats'; did you mean 'gate'"),
        ("lru+gate(n=2", "a parenthesis is open or closed too many"),
        ("lru+gate(m=1)", "policy 'gate' has no parameter 'm': it has n"),
        ("adaptive(lru,lfu)", "does not say when"),
        ("adaptive(lru,when=late>1)", "chooses between 2 policies, and is given 1"),
        ("adaptive(lru,gate,when=late>1)", "'gate' is a part of a policy"),
        ("adaptive(lru,lfu,when=heat>1)", "when is 'heat>1', and must be one of hit, late"),
        ("adaptive(lru,lfu,when=late>x)", "when is 'late>x'"),
        ("adaptive(lru,lfu,when=late>1,window=0)", "window must be 1 step or more"),
        ("adaptive(lru,lfu,when=late>1,window=a)", "window must be a number of steps, not 'a'"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(PolicyUsageError, match=said):
        find_policy(spec)


def test_the_base_paper_s_policy_is_the_composition_of_its_parts() -> None:
    assert "prefetching" in aspects_of(find_policy("lru-spec").policy)
    whole, parts = decisions("lru-spec:n=1,staging=1"), decisions("lru+gate(n=1)")
    assert any(event.kind is Kind.SPECULATE for event in whole)
    assert parts == whole


def test_one_aspect_of_a_policy_is_told_of_everything() -> None:
    """All aspects of a policy, each by a part of its own, decide what the policy decides."""
    whole = decisions("hobbit")
    assert {Kind.LOW, Kind.SKIP} <= {event.kind for event in whole}
    assert decisions("hobbit.eviction+hobbit.misses") == whole
    assert decisions("lru+hobbit.misses") != whole


def test_a_part_of_one_s_own_file_composes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from moepolicy import Policy\n"
        "class First(Policy):\n"
        "    def __init__(self, context):\n"
        "        self.n_experts = context.n_experts\n"
        "    def prefetch(self, step, keys):\n"
        "        keys[0] = (step.layer + 1) % 4 * self.n_experts\n"
        "        return 1\n"
    )
    found = decisions(f"lru+{mine}:First")
    fetched = {event.key for event in found if event.kind is Kind.SPECULATE}
    assert fetched
    assert {key % 8 for key in fetched} == {0}


def step_of(number: int, hits: int, late: int, misses: int, backlog: int = 0) -> Step:
    of = (np.zeros(1, np.int32), np.ones(1, np.float32))
    nothing = (np.empty(0, np.float32), np.empty((0, 0), np.float32))
    return Step(number, 0, *of, *nothing, 1, backlog, hits=hits, late=late, misses=misses)


def test_adaptive_compares_at_the_end_of_each_window() -> None:
    # Windows of 2 steps. The first: 1 late of 4; the second: 3 late of 4; the third: none of 4.
    policy: Any = find_policy("adaptive(lru,lfu,when=late>0.5,window=2)").build(CONTEXT)
    chosen = []
    for number, (hits, late, misses) in enumerate(
        [(0, 0, 0), (1, 0, 1), (2, 1, 1), (2, 3, 1), (3, 4, 1), (4, 4, 2), (6, 4, 2)]
    ):
        policy.on_step(step_of(number, hits, late, misses))
        chosen.append(int(policy.chosen[0]))
    assert chosen == [0, 0, 0, 0, 1, 1, 0]


def test_adaptive_compares_the_mean_backlog() -> None:
    # Means of 2 steps: 1.5 and then 3.
    policy: Any = find_policy("adaptive(lru,lfu,when=backlog<2,window=2)").build(CONTEXT)
    chosen = []
    for number, backlog in enumerate([0, 3, 2, 4, 0]):
        policy.on_step(step_of(number, 0, 0, 0, backlog))
        chosen.append(int(policy.chosen[0]))
    assert chosen == [0, 0, 1, 1, 0]


def test_who_is_not_chosen_is_up_to_date_when_it_is() -> None:
    always = decisions("adaptive(lfu,lru,when=hit<2,window=1)")
    lru = decisions("lru")
    first = next(i for i, event in enumerate(always) if event.step == 1)
    assert always[first:] == lru[first:]
    assert decisions("adaptive(lru,lfu,when=hit>2,window=1)") == lru


@pytest.mark.parametrize(
    "policy",
    [
        "lru+gate+hobbit.misses",
        "adaptive(lru-spec,lfu+gate(n=1),when=late>0.1,window=8)",
        "adaptive(lru,lru+adapmoe-skip.misses,when=miss>0.2,window=4)",
        f"lfu+gate+{OWN}:Rerouting.routing+{OWN}:Anything.misses",
    ],
)
def test_the_engines_agree_on_compositions(policy: str) -> None:
    spec = find_policy(policy)
    replayed = workload(policy)
    compiling = Compilations(worth_compiling=0)
    ways = ((Engine.simpy, INTERPRETED), (Engine.replay, INTERPRETED), (Engine.replay, compiling))
    rows = [
        simulate(
            replayed,
            spec,
            replace(load_machine("t4"), cpu=Cpu(workers=2, expert_s=1e-3, expert_token_s=1e-3)),
            slots=3,
            low_bytes=10,
            engine=engine,
            compilations=known,
            limits=False,
        ).row()
        for engine, known in ways
    ]
    assert rows[0] == rows[1] == rows[2]
    assert not compiling.interpreted
