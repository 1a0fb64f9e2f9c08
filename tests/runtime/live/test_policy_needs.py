"""What a policy declares it needs, live: given, or refused by name; its faults are told as in
simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moepolicy import Context, PolicyError, find_policy
from moerun.links import DiskLink
from moerun.live.session import Session
from moerun.memory.compiling import Compiling
from moerun.offload.gate import GateOutput
from moerun.settings import Settings
from support.links import RECORD_BYTES, MemoryRecords, MemorySlot

CONTEXT = Context(n_layers=3, n_experts=6, top_k=2, slots=3)
IDS, WEIGHTS = torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]])
BODY = """
from moepolicy import Policy
import numpy as np
class Mine(Policy):
    requires = frozenset({"predictions"})
    horizon = 2
    def __init__(self, context):
        self.rows = np.full(8, -1)
        self.n = 0
    def victim(self, layer, incoming, candidates):
        return VICTIM
    def prefetch(self, step, keys):
        self.rows[step.number] = len(step.predicted)
        return 0
"""


def mine(tmp_path: Path, victim: str = "candidates[0]", **changes: str) -> str:
    path = tmp_path / "mine.py"
    text = BODY.replace("VICTIM", victim)
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return f"{path}:Mine"


def session(policy: str, how: Compiling = Compiling.NEVER) -> Session:
    return Session(
        CONTEXT,
        find_policy(policy),
        lambda n: DiskLink(MemoryRecords(CONTEXT.n_keys), [MemorySlot() for _ in range(n)]),
        record_bytes=RECORD_BYTES,
        compiling=how,
    )


def serve(live: Session, layer: int, ahead: int, ids: torch.Tensor = IDS) -> None:
    predicted = torch.zeros((ahead, 1, CONTEXT.n_experts), dtype=torch.float16) if ahead else None
    output = GateOutput(torch.zeros((1, CONTEXT.n_experts)), predicted)
    list(live.serve(layer, ids, WEIGHTS, output))


def test_a_policy_is_given_as_many_predictions_as_it_declares(tmp_path: Path) -> None:
    with session(mine(tmp_path)) as live:
        serve(live, 0, ahead=2)
        serve(live, 1, ahead=3)  # as a recording asks for more
        rows: Any = vars(live.cache.policy)["rows"]
        assert rows[:2].tolist() == [2, 2]


@pytest.mark.parametrize("ahead", [0, 1])
def test_fewer_predictions_than_declared_are_refused(tmp_path: Path, ahead: int) -> None:
    with (
        session(mine(tmp_path)) as live,
        pytest.raises(
            PolicyError, match=rf"mine\.py:Mine' reads predictions 2 layers .* {ahead} ah"
        ),
    ):
        serve(live, 0, ahead=ahead)


def test_the_runner_asks_the_gates_as_far_as_the_policy_declares(tmp_path: Path) -> None:
    spec = find_policy(mine(tmp_path))
    assert Settings(policy=spec).predicts == 2
    assert Settings(policy=spec, horizon=1).predicts == 2
    assert Settings(policy=spec, horizon=3).predicts == 3
    assert Settings(policy=find_policy("lru-spec")).predicts == 1
    assert Settings(policy=find_policy("lru")).predicts == 0


@pytest.mark.parametrize(
    ("victim", "says"),
    [
        ("-7", r"victim named a negative key that is not -1: it answered -7, and must answer one"),
        ("incoming", r"victim named a key that was not among the candidates: it answered \d+, and"),
        ("self.absent", r"AttributeError: .* \(victim, step 2, .*mine\.py:11\)"),
    ],
)
def test_a_wrong_answer_is_told_live_as_in_simulation(
    tmp_path: Path, victim: str, says: str
) -> None:
    with session(mine(tmp_path, victim)) as live:
        serve(live, 0, ahead=2)
        serve(live, 0, ahead=2, ids=torch.tensor([[2, 1]]))
        with pytest.raises(PolicyError, match=says):
            serve(live, 0, ahead=2, ids=torch.tensor([[3, 4]]))


def test_a_policy_that_is_not_compiled_live_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = mine(tmp_path, **{"self.rows[step.number] = len(step.predicted)": "self.n += 1"})
    with session(spec, Compiling.ALWAYS) as live:
        live.wait_compiled()
        live.reset()
        live.wait_compiled()
        serve(live, 0, ahead=2)
        assert vars(live.cache.policy)["n"] == np.int64(1)
    (said,) = capsys.readouterr().err.splitlines()
    assert "Mine' runs interpreted: Mine.prefetch assigns 'n' (line 13): keep what" in said
