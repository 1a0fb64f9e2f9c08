"""Eviction by counts of uses, on traces worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from moepolicy import Context, PolicyError, find_policy
from support.step_by_step import StepByStep


@pytest.mark.parametrize(("guard", "gone"), [(3, 0), (1, 1)])
def test_lfru_guard_spares_a_newcomer(guard: int, gone: int) -> None:
    """0 has 4 uses, the last three passes ago: 4 / 3. 1 has one, 2 passes ago: 1 / 2, and would go;
    but it came one pass ago."""
    run = StepByStep(f"lfru-guard:guard={guard}", Context(1, 4, 1, slots=2))
    for expert in (0, 0, 0, 0, 1, 2):
        run.step([expert])
    assert run.evicted == [gone]


def test_lfru_guard_lets_all_go_where_all_are_spared() -> None:
    """0 came 2 passes ago and 1 the pass after: rates 1 / 3 and 1 / 2."""
    run = StepByStep("lfru-guard:guard=9", Context(1, 4, 1, slots=2))
    for expert in (0, 1, 2):
        run.step([expert])
    assert run.evicted == [0]


def test_coserve_keeps_every_newcomer() -> None:
    """Counts 5, 1, 3, 2. 1 makes room for 2; then 2, the least of those there, for 1 in turn."""
    counts = np.array([[5, 1, 3, 2]])
    run = StepByStep("coserve", Context(1, 4, 1, slots=2, counts=counts))
    gone = []
    for expert in (0, 1, 2, 1):
        run.step([expert])
        gone += run.evicted
    assert gone == [1, 2]


def test_bad_parameters_are_named() -> None:
    with pytest.raises(PolicyError, match="guard must be 1 or more, not 0"):
        find_policy("lfru-guard:guard=0").build(Context(1, 4, 1, 2))
    with pytest.raises(PolicyError, match="needs the expert counts"):
        find_policy("coserve").build(Context(1, 4, 1, 2))
