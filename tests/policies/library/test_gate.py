"""Prefetching by the gates of later layers, on traces worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from moepolicy import Context, PolicyError, find_policy
from support.step_by_step import StepByStep


@pytest.mark.parametrize(("more", "guessed"), [(0, [5]), (1, [5, 6]), (9, [5, 6, 4, 7])])
def test_fate_fetches_the_next_gate_s_choice_and_more(more: int, guessed: list[int]) -> None:
    run = StepByStep(f"fate:more={more}", Context(2, 4, 1, slots=4))
    run.step([0], 0, predicted=[[0.3, 0.9, 0.5, 0.1]])
    assert run.guessed == guessed
    run.step([0], 1)  # nothing is predicted beyond the last layer
    assert run.guessed == []


def test_fate_keeps_the_first_layers_of_a_shared_cache() -> None:
    """Ten slots for five layers of 4. The four first layers' eight are older, and would go under
    ARC; of the last layer the older of two goes."""
    gone = {}
    for policy in ("fate", "arc"):
        run = StepByStep(policy, Context(5, 4, 1, slots=2, scope="global"))
        for layer in range(4):
            run.step([0], layer)
            run.step([1], layer)
        for expert in (0, 1, 2):
            run.step([expert], 4)
        gone[policy] = run.evicted
    assert gone == {"fate": [16], "arc": [0]}


@pytest.mark.parametrize(
    ("slots", "shares"),
    [
        (8, [8, 8, 8, 8, 8, 8]),
        (6, [8, 8, 8, 8, 2, 2]),  # 36: 32 and 2 x 2
        (5, [8, 8, 8, 2, 2, 2]),  # 30: four whole layers would leave nothing
        (4, [8, 8, 2, 2, 2, 2]),
        (2, [2, 2, 2, 2, 2, 2]),
        (1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_fate_gives_the_first_layers_all_their_slots(slots: int, shares: list[int]) -> None:
    context = Context(6, 8, 2, slots)
    spec = find_policy("fate")
    assert spec.shares(context) == tuple(shares)
    policy: Any = spec.build(context)
    assert policy.capacity == shares[-1]


def test_fate_lets_the_first_layers_go_where_there_are_no_others() -> None:
    run = StepByStep("fate", Context(2, 4, 1, slots=1))
    run.step([0], 0)
    run.step([1], 0)
    assert run.evicted == [0]


@pytest.mark.parametrize(
    ("horizon", "likely", "guessed"),
    [
        (3, (1, 2), [10]),  # layer 1's is there: layer 2's
        (3, (3, 2), [7]),  # layer 1's is not: no further
        (1, (1, 2), []),  # no further than the horizon
    ],
)
def test_hobbit_looks_as_far_ahead_as_all_is_there(
    horizon: int, likely: tuple[int, int], guessed: list[int]
) -> None:
    run = StepByStep(f"hobbit-spec:horizon={horizon}", Context(3, 4, 1, slots=2))
    run.step([1], 1)
    ahead = [[float(e == one) for e in range(4)] for one in likely]
    run.step([0], 0, predicted=ahead)
    assert (run.loaded, run.guessed) == ([0], guessed)


def test_hobbit_with_prefetching_answers_misses_as_hobbit_does() -> None:
    run = StepByStep("hobbit-spec", Context(1, 4, 2, slots=4))
    assert run.step([2, 1], weights=[0.95, 0.05]) == ["MISS", "SKIP"]
    assert run.step([3, 1], weights=[0.7, 0.3]) == ["MISS", "MISS"]
    assert (run.cache.is_low(3), run.cache.is_low(1)) == (False, True)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fate:more=-1", "fate: more must be 0 or more, not -1"),
        ("hobbit-spec:horizon=0", "horizon must be 1 or more, not 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(1, 4, 1, 3))
