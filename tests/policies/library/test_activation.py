"""Policies that compare activations with those seen before, on traces worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from moepolicy import Context, PolicyError, Step, find_policy
from support.step_by_step import StepByStep


def test_edgemoe_fetches_what_has_followed() -> None:
    """Two layers of 4, one slot each. 2 followed 0, and 3 followed 1: with 0 in layer 0 again,
    layer 1's expert 2 (key 6) takes the place of 3 (key 7)."""
    run = StepByStep("edgemoe", Context(2, 4, 1, slots=1))
    for first, second in ((0, 2), (1, 3)):
        run.step([first], 0)
        assert run.guessed == []  # nothing has followed it yet
        run.step([second], 1)
    run.step([0], 0)
    assert (run.loaded, run.guessed, run.evicted) == ([0], [6], [1, 7])


@pytest.mark.parametrize(("first", "guess"), [(0, 10), (3, 8)])
def test_edgemoe_looks_at_two_layers_back(first: int, guess: int) -> None:
    """Layer 1's expert 1 was followed by 2 and by 0, once each: P = 1/2. Layer 0 decides: 0 was
    followed by 2 (P = 1), 3 by 0. Layer 2 holds 1 (key 9) meanwhile."""
    run = StepByStep("edgemoe", Context(3, 4, 1, slots=1))
    for token in ((0, 1, 2), (3, 1, 0), (2, 2, 1)):
        for layer, expert in enumerate(token):
            run.step([expert], layer)
    run.step([first], 0)
    run.step([1], 1)
    assert (run.guessed, run.evicted[-1]) == ([guess], 9)


def test_edgemoe_neither_learns_from_prompts_nor_guesses_for_them() -> None:
    run = StepByStep("edgemoe", Context(2, 4, 1, slots=1))
    run.step([0, 1], 0, tokens=3)
    run.step([2, 3], 1, tokens=3)
    run.step([0], 0)
    assert run.guessed == []
    run.step([1], 1)
    run.step([2], 1, tokens=3)
    run.step([0, 1], 0, tokens=3)
    assert run.guessed == []


def test_edgemoe_evicts_by_uses_over_distance() -> None:
    """Four layers of 2 share four slots. From layer 0: layer 0's other expert is spared; uses over
    distance of layer 1 are 2 / 1, of layer 2 2 / 2, of layer 3 4 / 3."""
    run = StepByStep("edgemoe", Context(4, 2, 1, slots=1, scope="global"))
    run.step([1], 0)
    for layer in (1, 2, 3, 1, 2, 3, 3, 3):
        run.step([0], layer)
    run.step([0], 0)
    assert (run.loaded, run.evicted) == ([0], [4])


def serve(run: StepByStep, *sequences: list[tuple[int, ...]]) -> None:
    """Sequences of tokens, each with an expert for every layer."""
    for sequence in sequences:
        for number, token in enumerate(sequence):
            for layer, expert in enumerate(token):
                run.step([expert], layer, begins_sequence=number + layer == 0)


def test_moe_infinity_fetches_what_the_likest_sequence_used() -> None:
    """The third sequence begins as the first did, cosine 1 against 0: of layer 1 expert 2 (key 6)
    takes the place of the second one's 3."""
    run = StepByStep("moe-infinity", Context(2, 4, 1, slots=1))
    serve(run, [(0, 2)], [(1, 3)])
    run.step([0], 0, begins_sequence=True)
    assert (run.guessed, run.evicted) == ([6], [1, 7])


def test_moe_infinity_weighs_a_share_by_its_distance() -> None:
    """After expert 0 the first sequence used 1 and 3 of layer 1, each 1/2, and 2 of layer 2. Of
    three layers: 1/2 x 3/4 < 1 x 2/4. Key 10 comes first, then of equals the lower key, 5."""
    run = StepByStep("moe-infinity:n=2", Context(3, 4, 1, slots=1))
    serve(run, [(0, 1, 2), (0, 3, 2)], [(1, 0, 0)])
    run.step([0], 0, begins_sequence=True)
    assert run.guessed == [10, 5]


def test_what_is_fitted_is_what_a_run_would_have_learned() -> None:
    """Fitted on a text in which 2 follows 0: with 0 in layer 0, key 6 comes at once."""
    context = Context(2, 4, 1, slots=1)
    for name in ("edgemoe", "moe-infinity"):
        learning = StepByStep(name, context)
        told: list[Step] = []
        learning.policy.on_step, on_step = told.append, learning.policy.on_step
        serve(learning, [(0, 2), (0, 2)])
        learning.policy.on_step = on_step
        params = find_policy(name).policy.fit(context, told, np.random.default_rng(0))
        run = StepByStep(name, context)
        run.policy.__init__(context, params=params)
        run.step([0], 0, begins_sequence=True)
        assert run.guessed == [6], name


@pytest.mark.parametrize(
    ("sequences", "gone"),
    [
        # Shares of the row and of all uses: 0 has 3/5 x 3/5, 1 1/5 x 1/5.
        ([[(0,), (0,), (0,), (1,), (2,)]], 1),
        # 0 has none of the row of this sequence.
        ([[(0,), (0,), (0,)], [(1,), (2,)]], 0),
    ],
)
def test_moe_infinity_keeps_what_this_sequence_uses(
    sequences: list[list[tuple[int, ...]]], gone: int
) -> None:
    run = StepByStep("moe-infinity", Context(1, 4, 1, slots=2))
    serve(run, *sequences)
    assert run.evicted == [gone]


def test_moe_infinity_keeps_as_many_sequences_as_it_may() -> None:
    """The second is matched at its one step and at no other; the third takes its place."""
    run = StepByStep("moe-infinity:capacity=2", Context(1, 4, 1, slots=4))
    serve(run, [(0,)], [(0,), (1,)], [(0,)], [(3,)], [(3,)])
    assert run.policy.n_stored[0] == 2
    stored = sorted(run.policy.stored[:, 0].tolist())
    assert stored == [[0, 0, 0, 1], [1, 0, 0, 0]]


A = ([0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1])
B = ([0.1, 0.1, 0.1, 0.7], [0.1, 0.1, 0.7, 0.1])


def serve_maps(run: StepByStep, *passes: tuple[list[float], ...]) -> None:
    """Passes of gates' probabilities; the likeliest expert is used."""
    for gates in passes:
        for layer, row in enumerate(gates):
            run.step([int(np.argmax(row))], layer, logits=[math.log(p) for p in row])


def test_finemoe_follows_the_likest_pass() -> None:
    """The first pass has no beginning and is not stored. The fourth begins as the second did, with
    cosine 1: of layer 1 one expert is enough, 1 (key 5), in place of the third one's 2 (key 6)."""
    run = StepByStep("finemoe:distance=1", Context(2, 4, 1, slots=1))
    serve_maps(run, A, A, B)
    run.step([0], 0, logits=[math.log(p) for p in A[0]])
    assert (run.guessed, run.evicted) == ([5], [3, 6])


@pytest.mark.parametrize(("new_text", "guessed"), [(False, [6]), (True, [])])
def test_finemoe_predicts_the_first_layers_by_the_last_gate_before(
    new_text: bool, guessed: list[int]
) -> None:
    """Pass 2 came after a pass that ended as A ends, and used 2 of layer 1 (key 6). Pass 4 comes
    after such a one, too, whatever it begins with."""
    run = StepByStep("finemoe:distance=2", Context(2, 4, 1, slots=1))
    serve_maps(run, A, B, A)
    run.step([1], 0, logits=[0.0] * 4, begins_sequence=new_text)
    assert run.guessed == guessed


@pytest.mark.parametrize(("likeness", "selected"), [(0.9, [6]), (0.25, [4, 6]), (0.15, [4, 5, 6])])
def test_finemoe_takes_more_the_worse_the_match(likeness: float, selected: list[int]) -> None:
    """Probabilities 0.1, 0.1, 0.7, 0.1: 0.7 >= 0.1; 0.8 >= 0.75; 0.9 >= 0.85."""
    run = StepByStep("finemoe", Context(2, 4, 1, slots=1))
    run.policy.maps[0, 1] = B[1]
    run.policy.predict(1, 0, likeness)
    assert np.flatnonzero(run.policy.wanted_in == 0).tolist() == selected


def test_finemoe_evicts_the_least_probability_times_visits() -> None:
    """Unpredicted, all have probability 1: 0 has two visits, 1 one."""
    run = StepByStep("finemoe", Context(1, 4, 1, slots=2))
    for expert in (0, 0, 1, 2):
        run.step([expert])
    assert run.evicted == [1]


def test_finemoe_spares_a_guess_of_a_later_layer_from_other_guesses() -> None:
    run = StepByStep("finemoe", Context(2, 4, 1, slots=1))
    run.policy.on_load(4, True, 1)
    candidates = np.array([4], np.int32)
    assert run.policy.victim(1, 5, candidates) == -1
    run.policy.passes[1] = 1  # its layer's own demand
    assert run.policy.victim(1, 5, candidates) == 4


def test_expertflow_fetches_what_the_token_has_used() -> None:
    """Token 7 used expert 2 of layer 1, then 8 used 3: with 7 again, key 6 comes for 7."""
    run = StepByStep("expertflow", Context(2, 4, 1, slots=1))
    for token, experts in ((7, (0, 2)), (8, (1, 3))):
        for layer, expert in enumerate(experts):
            run.step([expert], layer, token_ids=np.array([token], np.int32))
    run.step([0], 0, token_ids=np.array([7], np.int32))
    assert (run.guessed, run.evicted) == ([6], [1, 7])


@pytest.mark.parametrize(("token", "gone"), [(7, 1), (8, 0), (9, 0)])
def test_expertflow_evicts_what_is_not_predicted_first(token: int, gone: int) -> None:
    """Token 7 used 0, token 8 used 1; 9 is new, and the least recent goes."""
    run = StepByStep("expertflow", Context(1, 4, 1, slots=2))
    for number, expert in ((7, 0), (8, 1), (token, 2)):
        run.step([expert], token_ids=np.array([number], np.int32))
    assert run.evicted == [gone]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("moe-infinity:capacity=0", "capacity must be 1 or more, not 0"),
        ("moe-infinity:n=9", "n must be 0 to 8, not 9"),
        ("finemoe:distance=0", "capacity and distance must be 1 or more, not 64 and 0"),
        ("finemoe:n=9", "n must be 0 to 8, not 9"),
        ("expertflow:buckets=0", "buckets must be 1 or more, not 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(Context(2, 4, 1, 3))


def test_edgemoe_refuses_more_than_there_are() -> None:
    with pytest.raises(PolicyError, match="edgemoe: n must be 0 to 4, not 5"):
        find_policy("edgemoe:n=5").build(Context(2, 4, 1, slots=1))
