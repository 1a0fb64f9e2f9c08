"""What a policy may do about a miss, call by call, and the account of what that changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Event, ExpertCache, Kind, PolicyError, find_policy
from support.clock import context_for, drive, make_steps, scenarios

OWN = Path(__file__).parents[1] / "support" / "policies.py"


class Answering:
    """One layer of 4 experts and a policy with one answer, driven a step at a time."""

    def __init__(self, answer: Kind, *, slots: int = 2, **more: int) -> None:
        spec = f"{OWN}:AnswersLow:answer={answer}"
        spec += "".join(f",{name}={value}" for name, value in more.items())
        self.policy: Any
        steps = make_steps([(0, [0])], 4)
        context = context_for(steps, 1, 4, 1, slots, "layer")
        self.events: list[Event] = []
        self.policy = find_policy(spec).build(context)
        self.cache = ExpertCache(context, self.policy, observers=[self.events.append])
        self.number = 0

    def step(self, *experts: int) -> list[int]:
        """Open a step; its outcome."""
        step = make_steps([(0, list(experts))], 4)[0]._replace(number=self.number)
        self.number += 1
        self.events.clear()
        keys: list[int] = self.cache.begin(step).tolist()
        return keys

    def finish(self) -> None:
        while copy := self.cache.start():
            self.cache.finish(copy.key)
        self.cache.end()
        self.cache.check()

    def fill(self, *experts: int) -> None:
        """Load some at full precision."""
        answer, self.policy.answer = self.policy.answer, int(Kind.LOAD)
        for expert in experts:
            self.step(expert)
            self.finish()
        self.policy.answer = answer
        self.cache.arrays.mass[:] = 0

    @property
    def decided(self) -> list[tuple[str, int, int]]:
        return [(event.kind.name, event.key, event.other) for event in self.events]

    @property
    def pinned(self) -> list[int]:
        return np.flatnonzero(self.cache.arrays.pinned).tolist()


def test_what_is_skipped_is_neither_copied_nor_held() -> None:
    run = Answering(Kind.SKIP)
    assert run.step(2, 1) == [Kind.SKIP, Kind.SKIP]
    assert run.decided == [("MISS", 2, -1), ("SKIP", 2, -1), ("MISS", 1, -1), ("SKIP", 1, -1)]
    assert run.pinned == []
    assert run.cache.start() is None
    run.finish()
    assert run.cache.count(Kind.MISS) == 2
    assert run.cache.arrays.mass.tolist() == [1.5, 1.5, 0, 0, 0]


def test_a_substitute_is_pinned_and_used_and_let_go() -> None:
    run = Answering(Kind.SUBSTITUTE)
    run.fill(1, 3)
    heard: list[tuple[int, int]] = []
    run.policy.on_hit = lambda key, now: heard.append((key, now))
    assert run.step(2, 3) == [Kind.SUBSTITUTE, Kind.HIT]
    assert run.decided == [("MISS", 2, -1), ("SUBSTITUTE", 2, 1), ("HIT", 3, -1)]
    assert (run.cache.substitute(0), run.cache.substitute(1)) == (1, -1)
    assert run.pinned == [1, 3]
    assert [key for key, _ in heard] == [3, 1]  # the heavier expert's is the more recent use
    assert heard[0][1] < heard[1][1]
    run.finish()
    assert run.pinned == []
    assert run.cache.substitute(0) == -1
    assert run.cache.arrays.mass.tolist() == [1.5, 0, 1.0, 0, 0]


def test_a_miss_that_nobody_stands_in_for_is_loaded() -> None:
    run = Answering(Kind.SUBSTITUTE)
    assert run.step(2) == [Kind.MISS]  # nobody is here
    run.finish()
    run.policy.who = -1
    assert run.step(0) == [Kind.MISS]
    run.finish()
    assert (run.cache.count(Kind.LOAD), run.cache.count(Kind.SUBSTITUTE)) == (2, 0)


def test_a_low_copy_is_a_hit_where_any_will_do() -> None:
    run = Answering(Kind.LOW)
    assert run.step(2) == [Kind.MISS]
    copy = run.cache.start()
    assert copy is not None
    assert (copy.key, copy.low, copy.speculative) == (2, True, False)
    run.cache.finish(2)
    run.finish()
    run.policy.answer = int(Kind.LOAD)
    assert run.step(2, 1) == [Kind.HIT, Kind.MISS]
    copy = run.cache.start()
    assert copy is not None
    assert (copy.key, copy.low) == (1, False)
    run.cache.finish(1)
    run.finish()
    assert (run.cache.is_low(2), run.cache.is_low(1)) == (True, False)
    assert run.cache.arrays.mass.tolist() == [2.5, 0, 0, 2.0, 0]


def test_a_low_copy_leaves_first_where_only_the_full_one_will_do() -> None:
    run = Answering(Kind.LOW, other=int(Kind.LOAD))
    gone: list[int] = []
    run.policy.on_evict = gone.append
    run.step(2)
    run.finish()
    run.policy.answer = int(Kind.LOAD)
    assert run.step(2) == [Kind.MISS]
    assert run.decided == [("EVICT", 2, 2), ("MISS", 2, -1)]
    assert gone == [2]
    run.finish()
    assert not run.cache.is_low(2)
    assert run.step(2) == [Kind.HIT]  # a full copy is what it asks for
    run.finish()
    assert run.cache.arrays.mass.tolist() == [3.0, 0, 0, 1.0, 0]


def test_nobody_stands_in_with_a_copy_that_is_about_to_leave() -> None:
    run = Answering(Kind.LOW, other=int(Kind.LOAD))
    run.step(2)
    run.finish()
    run.policy.answer = int(Kind.SUBSTITUTE)
    assert run.step(1, 2) == [Kind.MISS, Kind.MISS]
    run.finish()


def test_computing_elsewhere_changes_no_mass() -> None:
    run = Answering(Kind.COMPUTE)
    assert run.step(2) == [Kind.COMPUTE]
    run.finish()
    assert run.cache.arrays.mass.tolist() == [1.0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (f"AnswersLow:answer={int(Kind.HIT)}", "none of LOAD, COMPUTE, LOW, SUBSTITUTE and SKIP"),
        (f"AnswersLow:answer={int(Kind.LOW)},other=0", "neither LOW nor LOAD"),
        (f"AnswersLow:answer={int(Kind.SUBSTITUTE)},who=3", "not among the candidates"),
        (f"Answers:answer={int(Kind.LOW)}", '"low" into what the policy requires'),
        (f"Answers:answer={int(Kind.COMPUTE)}", '"cpu" into what the policy requires'),
    ],
)
def test_an_answer_that_is_none_is_refused(spec: str, says: str) -> None:
    steps = make_steps([(0, [0]), (0, [0]), (0, [1])], 4)
    loads_first = "who" in spec
    context = context_for(steps, 1, 4, 1, 2, "layer")
    cache = ExpertCache(context, find_policy(f"{OWN}:{spec}").build(context), name="mine")
    policy: Any = cache.policy
    answer = policy.answer

    def run() -> None:
        for step in steps:
            policy.answer = Kind.LOAD if loads_first and step.number == 0 else answer
            cache.begin(step)
            while copy := cache.start():
                cache.finish(copy.key)
            cache.end()

    with pytest.raises(PolicyError, match=f"'mine' failed: .*{says}"):
        run()


@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_account_is_of_what_happened(scenario: dict[str, Any], seed: int) -> None:
    steps, context = scenario["steps"], scenario["context"]
    cache, seen = drive(f"{OWN}:Anything", context, steps, seed=seed)
    weight = {
        (step.number, key): float(w)
        for step in steps
        for key, w in zip(step.experts.tolist(), step.weights, strict=True)
    }
    low: dict[int, bool] = {}
    lost = {Kind.SKIP: 0.0, Kind.SUBSTITUTE: 0.0, Kind.LOW: 0.0}
    for kind, step, key, _ in seen.events:
        if kind in (Kind.EVICT, Kind.MISS):
            low[key] = False
        if kind == Kind.LOW:
            low[key] = True
        if kind in lost or (kind == Kind.HIT and low.get(key)):
            lost[kind if kind in lost else Kind.LOW] += weight[step, key]
    everything = sum(weight.values())
    expected = [everything, lost[Kind.SKIP], lost[Kind.SUBSTITUTE], lost[Kind.LOW], 0.0]
    np.testing.assert_allclose(cache.arrays.mass, expected, rtol=1e-9)


def test_a_policy_that_leaves_misses_alone_has_no_account() -> None:
    steps = make_steps([(0, [0])], 4)
    cache, _ = drive("lru", context_for(steps, 1, 4, 1, 2, "layer"), steps)
    assert len(cache.arrays.mass) == 0
