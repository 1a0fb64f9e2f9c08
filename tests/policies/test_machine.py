"""The state machine under arbitrary clocks: what must hold whatever the policy and the timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, Kind, PolicyError, find_policy, replay_journal
from support.clock import context_for, drive, make_steps, scenarios
from support.step_by_step import StepByStep

QUEUES = ["clock", "sieve", "slru:protected=0.5", "2q", "s3-fifo:small=0.5,ghosts=1", "arc"]
FREQUENCIES = ["lfu-aging", "lfu-aging:aging=0", "lfru", "least-stale", "class-lru:half_life=2"]
DEMAND_ONLY = [
    *["lru", "lfu", "fifo", "random:seed=3", "static", "belady", "belady-bypass"],
    *QUEUES,
    *FREQUENCIES,
]
PREFETCHING = ["lru-spec:n=1,staging=1", "lru-spec:n=2,staging=4"]
OWN = Path(__file__).parents[1] / "support" / "policies.py"
SLOT_PREFETCHING = f"{OWN}:SlotSpec"
FILLING = f"{OWN}:Filling"


GUESSING = [
    f"{OWN}:Guessing:eviction={name}"
    for name in ["clock", "sieve", "slru", "2q", "s3-fifo", "arc", "arc,staging=2", "lfu-aging"]
]
CHOOSING = f"{OWN}:Anything"
CHOOSING_AHEAD = [f"{OWN}:AnythingAhead", f"{OWN}:AnythingStaged"]
ALL = [*DEMAND_ONLY, *PREFETCHING, SLOT_PREFETCHING, FILLING, *GUESSING, CHOOSING, *CHOOSING_AHEAD]


@pytest.mark.parametrize("policy", ALL)
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_invariants_hold_after_every_call(policy: str, scenario: dict[str, Any], seed: int) -> None:
    steps, context = scenario["steps"], scenario["context"]
    cache, seen = drive(policy, context, steps, seed=seed, streams=scenario["streams"], check=True)
    requests = seen.of_kind(Kind.HIT, Kind.LATE, Kind.MISS)
    assert [key for _, _, key, _ in requests] == [k for s in steps for k in s.experts.tolist()]
    # Each miss is copied once, or the policy had another answer; nothing else is demanded.
    answered = {
        (step, key) for _, step, key, _ in seen.of_kind(Kind.COMPUTE, Kind.SKIP, Kind.SUBSTITUTE)
    }
    missed = [(step, key) for _, step, key, _ in seen.of_kind(Kind.MISS)]
    assert answered <= set(missed)
    missed = [miss for miss in missed if miss not in answered]
    loaded = [(step, key) for _, step, key, _ in seen.of_kind(Kind.LOAD)]
    assert sorted(missed) == sorted(loaded)
    # A guess is cancelled, dropped or copied at most once for each time it was queued.
    ended = len(seen.of_kind(Kind.CANCEL, Kind.DROP, Kind.SPECULATE))
    assert ended <= cache.count(Kind.QUEUE_PREFETCH)
    assert cache.count(Kind.USELESS) <= cache.count(Kind.SPECULATE)


@pytest.mark.parametrize("policy", [*DEMAND_ONLY, CHOOSING])
@given(scenario=scenarios(), seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)))
@settings(max_examples=40, deadline=None)
def test_without_prefetching_the_clock_decides_nothing(
    policy: str, scenario: dict[str, Any], seeds: tuple[int, int]
) -> None:
    """Property 1: same steps, any clocks, any number of streams: the same decisions in order."""
    steps, context = scenario["steps"], scenario["context"]
    _, one = drive(policy, context, steps, seed=seeds[0], streams=1)
    _, other = drive(policy, context, steps, seed=seeds[1], streams=scenario["streams"])
    assert one.events == other.events


@pytest.mark.parametrize("policy", ALL)
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_journal_takes_the_place_of_the_clock(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    """Property 2: a run's calls, replayed, give every decision of the run."""
    steps, context = scenario["steps"], scenario["context"]
    _, live = drive(policy, context, steps, seed=seed, streams=scenario["streams"])
    again: list[Any] = []
    cache = ExpertCache(context, find_policy(policy).build(context), observers=[again.append])
    replay_journal(cache, steps, live.journal)
    assert again == live.events


@pytest.mark.parametrize("policy", ["lru", PREFETCHING[1], SLOT_PREFETCHING, *CHOOSING_AHEAD])
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_policy_hears_of_every_arrival_and_departure(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    spec = find_policy(policy)
    context = scenario["context"]
    built = spec.build(context)
    held: set[int] = set()

    class Listener(type(built)):  # type: ignore[misc]
        def on_load(self, key: int, speculative: bool, now: int) -> None:
            assert key not in held
            held.add(key)
            super().on_load(key, speculative, now)

        def on_evict(self, key: int) -> None:
            held.remove(key)
            super().on_evict(key)

    built.__class__ = Listener
    cache = ExpertCache(context, built)
    _, live = drive(policy, context, scenario["steps"], seed=seed, streams=2)
    replay_journal(cache, scenario["steps"], live.journal)
    assert held == {int(k) for k in np.flatnonzero(cache.arrays.place >= 0)}


# One layer of 4 experts, 2 slots, top-1. The trace, LRU's cache after each step, what happens:
#   0    {0}      miss
#   1    {0, 1}   miss
#   0    {1, 0}   hit
#   2    {0, 2}   miss, evicts 1
#   1    {2, 1}   miss, evicts 0
#   2    {1, 2}   hit
SMALL = [0, 1, 0, 2, 1, 2]


@pytest.mark.parametrize(
    ("policy", "hits", "victims"),
    [
        ("lru", 2, [1, 0]),
        ("fifo", 3, [0]),  # the oldest goes although it was just used; 1 and 2 are then there
        ("lfu", 1, [1, 2, 0]),  # 0 has two uses and stays until 1 has as many
        ("belady", 3, [0]),  # 0 is never used again
    ],
)
def test_a_trace_by_hand(policy: str, hits: int, victims: list[int]) -> None:
    steps = make_steps([(0, [e]) for e in SMALL], 4)
    cache, seen = drive(policy, context_for(steps, 1, 4, 1, 2, "layer"), steps)
    assert [key for _, _, key, _ in seen.of_kind(Kind.EVICT)] == victims
    assert cache.count(Kind.HIT) == hits


def test_the_heaviest_expert_of_a_step_is_the_most_recent() -> None:
    # 3 and then 1 were used in one step, 3 the heavier: 1 must go first.
    steps = make_steps([(0, [3, 1]), (0, [2])], 4)
    _, seen = drive("lru", context_for(steps, 1, 4, 2, 2, "layer"), steps)
    assert [key for _, _, key, _ in seen.of_kind(Kind.EVICT)] == [1]


def test_a_prompt_wider_than_the_cache_passes_through_staging() -> None:
    steps = make_steps([(0, [3, 1, 0, 2])], 4)
    cache, seen = drive("lru", context_for(steps, 1, 4, 2, 2, "layer"), steps, check=True)
    assert [key for _, _, key, _ in seen.of_kind(Kind.BYPASS)] == [0, 2]
    # What stays are the heaviest.
    assert sorted(k for k in range(4) if cache.slot_of(k) >= 0) == [1, 3]


def test_without_any_slot_everything_is_used_from_staging() -> None:
    steps = make_steps([(0, [0, 1]), (0, [0, 1])], 2)
    cache, _ = drive("lru", context_for(steps, 1, 2, 2, 0, "layer"), steps, check=True)
    assert (cache.count(Kind.HIT), cache.count(Kind.BYPASS)) == (0, 4)


def test_a_global_cache_smaller_than_a_token_never_hits_under_lru() -> None:
    """FACTS: below one token's demand, LRU over all layers has always just evicted what comes."""
    steps = make_steps([(layer, [0]) for _ in range(5) for layer in range(4)], 2)
    enough = context_for(steps, 4, 2, 1, 1, "global")
    cache, _ = drive("lru", enough, steps)
    assert cache.count(Kind.HIT) == 16  # room for exactly one token's demand: all but the first
    cyclic = make_steps([(layer, [0, 1]) for _ in range(5) for layer in range(4)], 2)
    cache, _ = drive("lru", context_for(cyclic, 4, 2, 2, 1, "global"), cyclic)
    assert cache.count(Kind.HIT) == 0  # four slots, a demand of eight


def guess(n_experts: int, *likely: int) -> Any:
    row = np.zeros((1, n_experts), np.float32)
    for rank, expert in enumerate(likely):
        row[0, expert] = 10.0 - rank
    return row


def none(n_experts: int) -> Any:
    return np.full((1, n_experts), np.nan, np.float32)


class Manual:
    """A cache driven call by call, with the names of what it decided."""

    def __init__(self, policy: str, context: Context) -> None:
        self.decided: list[tuple[str, int]] = []
        self.cache = ExpertCache(
            context,
            find_policy(policy).build(context),
            observers=[lambda e: self.decided.append((e.kind.name, e.key))],
        )

    def take(self) -> list[tuple[str, int]]:
        decided, self.decided = self.decided, []
        return decided

    def load_all(self) -> None:
        while copy := self.cache.start():
            self.cache.finish(copy.key)

    def whole_step(self, step: Any) -> None:
        self.cache.begin(step)
        self.load_all()
        for key in step.experts.tolist():
            self.cache.consume(key)
        self.cache.end()


def lru_spec_run(n: int = 1, staging: int = 1) -> tuple[Manual, list[Any]]:
    """Two layers of 4 experts, one slot each; layer 0 always guesses its own expert for layer 1.

    Layer 1 has seen expert 0 and is asked for 1, which is guessed right, then for 3 on a guess
    of 2.
    """
    demands = [(0, [0]), (1, [0]), (0, [1]), (1, [1]), (0, [2]), (1, [3]), (0, [2]), (1, [2])]
    predicted = [
        guess(4, 0),
        none(4),
        guess(4, 1, 3),
        none(4),
        guess(4, 2),
        none(4),
        none(4),
        none(4),
    ]
    steps = make_steps(demands, 4, predicted)
    manual = Manual(f"lru-spec:n={n},staging={staging}", context_for(steps, 2, 4, 1, 1, "layer"))
    manual.whole_step(steps[0])
    manual.whole_step(steps[1])
    manual.take()
    return manual, steps


def test_lru_spec_promotes_a_right_guess_when_it_is_used() -> None:
    manual, steps = lru_spec_run()
    manual.whole_step(steps[2])
    assert manual.take() == [
        ("MISS", 1),
        ("QUEUE_PREFETCH", 5),
        ("EVICT", 0),
        ("LOAD", 1),
        ("SPECULATE", 5),
    ]
    cache = manual.cache
    buffer = cache.slot_of(5)
    outcome = cache.begin(steps[3])
    assert outcome.tolist() == [Kind.HIT]
    # Layer 1's one slot held expert 0 (key 4); the guess takes its place without moving.
    assert manual.take() == [("HIT", 5), ("EVICT", 4), ("PROMOTE", 5)]
    assert cache.slot_of(5) == buffer


def test_lru_spec_waits_for_a_guess_in_flight() -> None:
    manual, steps = lru_spec_run()
    cache = manual.cache
    cache.begin(steps[2])
    copies = [cache.start(), cache.start()]
    assert [c and (c.key, c.speculative) for c in copies] == [(1, False), (5, True)]
    cache.finish(1)
    cache.consume(1)
    cache.end()
    assert cache.begin(steps[3]).tolist() == [Kind.LATE]
    cache.finish(5)
    cache.consume(5)
    cache.end()
    cache.check()
    assert cache.count(Kind.USELESS) == 0


def test_lru_spec_forgets_a_wrong_guess_and_cancels_a_queued_one() -> None:
    manual, steps = lru_spec_run()
    manual.whole_step(steps[2])
    manual.whole_step(steps[3])
    manual.whole_step(steps[4])  # guesses key 6, and it lands
    manual.take()
    manual.cache.begin(steps[5])  # wants key 7
    assert manual.take() == [("USELESS", 6), ("MISS", 7)]

    manual, steps = lru_spec_run()
    cache = manual.cache
    cache.begin(steps[2])
    copy = cache.start()
    assert copy is not None
    cache.finish(copy.key)
    cache.consume(copy.key)
    cache.end()  # the guess (key 5) is still queued
    wrong = steps[3]._replace(experts=np.array([7], np.int32))
    manual.take()
    cache.begin(wrong)
    assert manual.take() == [("CANCEL", 5), ("MISS", 7)]


def test_demand_overtakes_and_claims_a_queued_guess() -> None:
    manual, steps = lru_spec_run()
    cache = manual.cache
    cache.begin(steps[2])
    copy = cache.start()
    assert copy is not None
    cache.finish(copy.key)
    cache.consume(copy.key)
    cache.end()
    assert cache.begin(steps[3]).tolist() == [Kind.MISS]  # queued, not started: moves to demand
    copy = cache.start()
    assert copy is not None
    assert (copy.key, copy.speculative) == (5, False)


def test_a_guess_without_a_free_buffer_is_dropped() -> None:
    manual, steps = lru_spec_run(n=2, staging=1)
    manual.whole_step(steps[2])
    kinds = [kind for kind, _ in manual.take()]
    assert (kinds.count("SPECULATE"), kinds.count("DROP")) == (1, 1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "my victim table is empty"),
        ("pinned", "not among the candidates"),
        ("beyond", "does not exist"),
        ("prefetch", "prefetch named a key that does not exist"),
    ],
)
def test_a_policy_that_breaks_the_rules_is_named(how: str, says: str) -> None:
    steps = make_steps([(0, [0]), (0, [1])], 2)
    with pytest.raises(PolicyError, match=says) as caught:
        drive(f"{OWN}:Broken:how={how}", context_for(steps, 1, 2, 1, 1, "layer"), steps)
    assert "Broken" in str(caught.value)


def test_slots_and_staging_below_what_works_are_refused() -> None:
    steps = make_steps([(0, [0])], 2)
    context = context_for(steps, 1, 2, 1, 1, "layer")
    with pytest.raises(PolicyError, match="slots must be 0 or more, not -1"):
        drive("lru", context._replace(slots=-1), steps)
    with pytest.raises(PolicyError, match="staging must be 1 or more"):
        drive("lru-spec:staging=0", context, steps)
    with pytest.raises(PolicyError, match="staging is 1099511627776, and the model has 2 experts"):
        drive("lru-spec:staging=1099511627776", context, steps)
    with pytest.raises(PolicyError, match="'layer' or 'global'"):
        drive("lru", context._replace(scope="both"), steps)


def test_a_guess_fills_a_free_slot_and_stays() -> None:
    """Two layers of 4 experts in 2 slots each, guesses of keys 4, 5 and 6 at layer 0. 4 and 5 take
    layer 1's free slots, 6 a buffer. Layer 1 uses its expert 3: what lies in slots stays but for
    the one that makes room, the candidate 7 % 2, and 6 goes."""
    run = StepByStep(FILLING, Context(2, 4, 1, slots=2))
    run.step([1], 0)
    assert run.guessed == [4, 5, 6]
    assert {4, 5, 6} <= set(run.held)
    run.step([3], 1)
    assert 6 not in run.held
    assert {4, 7} == {key for key in run.held if key >= 4}
