"""The forms a policy runs in: interpreted, called by address, in one piece. All decide alike."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import PolicyError, find_policy, policy_names
from moepolicy.compiled import NotCompilable
from moepolicy.policy import HOOKS
from moepolicy.state import arrays_of
from moeroute import open_trace
from moesim import Machine, load_workload
from moesim.engines import choose as engines
from moesim.engines import one_piece
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import Sizes, costs_of
from support.machines import full_machines, machine, machines
from support.traces import traces, write_trace

OWN = Path(__file__).parents[2] / "support" / "policies.py"
OWN_POLICIES = [
    f"{OWN}:{name}" for name in ("SlotSpec", "AnythingAhead", "AnythingStaged", "Declining")
]
SIZES = Sizes(10, 5, 3, 2, low_bytes=4)


def job_of(workload: Any, policy: str, on: Machine, slots: int, scope: str = "layer") -> Any:
    spec = find_policy(policy)
    shown = workload.shown_to(spec)
    predicting = "predictions" in spec.requires
    costs = costs_of(workload, on, SIZES, predicting=predicting)
    return engines._Replay(shown, spec, workload.context(slots, scope), costs, timeline=True)


def ended(job: Any, *, compile: bool) -> Any:
    cache, clock = job.run(compile=compile)
    arrays = {name: array.tolist() for name, array in arrays_of(cache).items()}
    return arrays, clock


def loaded(tmp_path: Path, case: Any) -> tuple[Any, int]:
    (tokens, predicted), n_experts, slots = case
    path = write_trace(tmp_path / "t.parquet", tokens, n_experts, predicted, logits=True)
    return load_workload(open_trace(path), predictions=True, logits=True), slots


def drawn(data: st.DataObject) -> Any:
    return data.draw(traces()), data.draw(full_machines), data.draw(st.sampled_from(SCOPES))


SCOPES = ["layer", "global"]
FEW = ["lru", "belady-bypass", "lru-spec", OWN_POLICIES[1]]


def all_policies() -> list[Any]:
    names = [*policy_names(), *OWN_POLICIES]
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("policy", all_policies())
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_called_by_address_a_policy_decides_what_it_does_interpreted(
    tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject
) -> None:
    case, on, scope = drawn(data)
    workload, slots = loaded(tmp_path_factory.mktemp("t"), case)
    job = job_of(workload, policy, on, slots, scope)
    assert ended(job, compile=True) == ended(job, compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "lru-spec", "arc", OWN_POLICIES[1]])
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_in_one_piece_a_policy_decides_what_it_does_interpreted(
    tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject
) -> None:
    case, on, scope = drawn(data)
    workload, slots = loaded(tmp_path_factory.mktemp("t"), case)
    job = job_of(workload, policy, on, slots, scope)
    assert ended(replace(job, in_one_piece=True), compile=True) == ended(job, compile=False)


@pytest.mark.slow
def test_a_run_changes_over_to_one_piece_between_two_chunks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The piece is there from the third chunk on, and the run ends as it would have."""
    workload = load_workload(open_trace("tiny")).head(64)
    monkeypatch.setattr(engines, "CHUNK", 32)
    job = job_of(workload, "lru", machine(), 3)
    expected = ended(job, compile=False)
    asked: list[int] = []

    def is_there(*_: Any, **__: Any) -> bool:
        asked.append(1)
        return len(asked) > 2

    begun: list[Any] = []
    monkeypatch.setattr(one_piece, "is_compiled", is_there)
    monkeypatch.setattr(one_piece, "_begin", lambda *about: begun.append(about))
    known = Compilations(worth_compiling=0, worth_one_piece=0)
    used: list[Any] = []

    def used_piece(*of: Any) -> Any:
        used.append(of)
        return one_piece.piece(*of)

    monkeypatch.setattr(engines, "piece", used_piece)
    cache, clock = engines.run(
        job.workload, job.policy, job.context, job.costs, compilations=known, timeline=True
    )
    assert ({name: array.tolist() for name, array in arrays_of(cache).items()}, clock) == expected
    assert len(begun) == 1
    assert len(used) == 2  # once on the prefix, once for the rest
    assert not known.interpreted


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "belady-bypass"])
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_in_one_piece_steps_are_counted_by_kind_as_interpreted(
    tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject
) -> None:
    case, _, scope = drawn(data)
    on = replace(data.draw(machines), disk=None)
    workload, slots = loaded(tmp_path_factory.mktemp("t"), case)
    job = replace(job_of(workload, policy, on, slots, scope), timeline=False)
    assert ended(replace(job, in_one_piece=True), compile=True) == ended(job, compile=False)


def test_a_piece_that_decides_differently_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = load_workload(open_trace("tiny")).head(20)
    job = job_of(workload, "lru", machine(), 3)
    policy = job.policy.build(job.context)
    monkeypatch.setattr(one_piece, "is_compiled", lambda *_, **__: True)
    pieces = one_piece.Pieces()
    asked: list[int] = []

    def differs() -> bool:
        asked.append(1)
        return False

    assert not pieces.ready(job.policy, policy, frozenset(), differs)
    assert not pieces.ready(job.policy, policy, frozenset(), lambda: True)
    assert asked == [1]


BODY = """import numpy as np
from moepolicy import Policy
from moepolicy.kinds import LOW, SUBSTITUTE


class Mine(Policy):
    requires = frozenset({"low", "cpu", "predictions"})
    lossy = True

    def __init__(self, context):
        self.calls = np.zeros(1, np.int64)

    def victim(self, layer, incoming, candidates):
        return -1 if incoming % 3 == 0 else candidates[0]

    def on_miss(self, step, rank):
        return LOW if step.number % 2 else SUBSTITUTE

    def prefetch(self, step, keys):
        keys[0] = (step.experts[0] + 1) % 64
        return 1
"""
ANSWERS = {
    "victim": "candidates[0]",
    "on_miss": "LOW",
    "precision": "LOW",
    "retain": "-1",
    "substitute": "candidates[0]",
}
ARGUMENTS = {
    "on_step": "step",
    "on_hit": "key, now",
    "on_load": "key, speculative, now",
    "on_evict": "key",
    "victim": "layer, incoming, candidates",
    "retain": "layer, key, candidates",
    "on_miss": "step, rank",
    "precision": "step, rank",
    "substitute": "step, rank, candidates",
    "prefetch": "step, keys",
    "wants_predictions": "layer",
}


@pytest.mark.parametrize("hook", sorted(ARGUMENTS))
def test_an_error_in_any_hook_is_named_as_the_interpreter_names_it(
    tmp_path: Path, hook: str
) -> None:
    """The third call raises. `on_resize` is called in no replay, and `route` of few traces."""
    assert set(ARGUMENTS) == HOOKS - {"on_resize", "route"}
    path = tmp_path / "mine.py"
    raising = (
        f"\n    def {hook}(self, {ARGUMENTS[hook]}):\n        self.calls[0] += 1\n"
        "        if self.calls[0] > 2:\n            raise ValueError('enough')\n"
        f"        return {ANSWERS.get(hook, '0')}\n"
    )
    path.write_text(BODY + raising)
    workload = load_workload(open_trace("tiny"), predictions=True, logits=True).head(30)
    job = job_of(workload, f"{path}:Mine", machine(), 2)
    with pytest.raises(PolicyError) as interpreted:
        job.run(compile=False)
    with pytest.raises(ValueError, match="enough"):
        job.run(compile=True)
    known = Compilations(worth_compiling=0, prefix=0)
    with pytest.raises(PolicyError) as compiled:
        engines.run(workload, job.policy, job.context, job.costs, compilations=known)
    assert str(compiled.value) == str(interpreted.value)
    assert re.search(rf"enough .*\({hook}, step \d+, .*mine\.py:\d+\)", str(compiled.value))
    assert (Engine.replay, job.policy.policy) in known.proven  # it was compiled code that raised


def test_a_policy_cannot_write_into_a_step(tmp_path: Path) -> None:
    """The steps' arrays are the workload's own."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from moepolicy import Policy\nclass Mine(Policy):\n"
        "    def victim(self, layer, incoming, candidates):\n        return candidates[0]\n"
        "    def on_step(self, step):\n        step.weights[0] = 2.0\n"
    )
    workload = load_workload(open_trace("tiny")).head(4)
    job = job_of(workload, f"{path}:Mine", machine(), 2)
    with pytest.raises(Exception, match="Cannot modify readonly array"):
        job.run(compile=True)


def test_a_number_beyond_64_bits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from moepolicy import Policy\nclass Mine(Policy):\n"
        "    def __init__(self, context):\n        self.mask = 1 << 70\n"
        "    def victim(self, layer, incoming, candidates):\n        return candidates[0]\n"
    )
    workload = load_workload(open_trace("tiny")).head(4)
    job = job_of(workload, f"{path}:Mine", machine(), 2)
    with pytest.raises(NotCompilable, match=r"more than 64 bits: mask"):
        job.run(compile=True)


def test_two_classes_of_one_name_have_hooks_of_their_own(tmp_path: Path) -> None:
    """As when an author edits a file and runs it again in one process."""
    workload = load_workload(open_trace("tiny")).head(40)
    loads = []
    for rank in ("0", "len(candidates) - 1"):
        path = tmp_path / "mine.py"
        path.write_text(
            "from moepolicy import Policy\nclass Mine(Policy):\n"
            "    def victim(self, layer, incoming, candidates):\n"
            f"        return candidates[{rank}]\n"
        )
        job = job_of(workload, f"{path}:Mine", machine(), 3)
        assert ended(job, compile=True) == ended(job, compile=False)
        loads.append(ended(job, compile=True)[0]["counters"])
    assert loads[0] != loads[1]
