"""What a policy declares it needs, live: given, or refused by name; its faults are told as in
simulation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moepolicy import Context, PolicyError, find_policy
from moepolicy.refusals import Refusals
from moerun.checkpoint.hub import resolve
from moerun.commands.options import CacheOptions, DeviceOptions
from moerun.commands.prepare import settings
from moerun.links import DiskLink
from moerun.live.recording import live_meta
from moerun.live.runner import Runner
from moerun.live.session import Session
from moerun.memory.compiling import Compiling
from moerun.offload.gate import GateOutput
from moerun.policies import servable
from moerun.settings import Settings
from moerun.store.pack import pack
from moesim import load_machine
from moesim.machine.speed import with_constants
from moesim.sizes import sizes_of
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


KNOWING = """
from moepolicy import Policy
class Mine(Policy):
    requires = frozenset({"speed", "bytes"})
    def __init__(self, context):
        self.known = context.copy_over_layer, context.expert_bytes, context.low_bytes
        self.gates = context.gates_over_layer
    def victim(self, layer, incoming, candidates):
        return candidates[0]
"""
PROFILE = """
[link]
bytes_per_s = 1e9
latency_s = 1e-5
chunk_bytes = 4096
[compute]
layer_s = 1e-4
prefetch_s = 3e-5
expert_s = 2e-5
memory_bytes_per_s = 5e9
"""


def test_a_policy_knows_the_machine_and_the_experts_as_it_does_simulated(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(KNOWING)
    (tmp_path / "mine.toml").write_text(PROFILE)
    spec, profile = find_policy(f"{tmp_path}/mine.py:Mine"), str(tmp_path / "mine.toml")
    store = pack(resolve("tiny"), tmp_path / "tiny")
    low = pack(resolve("tiny"), tmp_path / "2bit", precision="2bit")
    with Runner(store, Settings(spec, slots=2, machine=profile)) as runner:
        alone = vars(runner.session.cache.policy)["known"]
        meta = live_meta(runner, 0)
    with Runner(store, Settings(spec, slots=2, machine=profile, low=low)) as runner:
        known = vars(runner.session.cache.policy)["known"]
        gates = vars(runner.session.cache.policy)["gates"]
    own = next(iter(meta.expert_bytes.values()))
    sizes = sizes_of(meta, own, low.record_bytes)
    expected = with_constants(CONTEXT, load_machine(profile), sizes)
    assert known == (expected.copy_over_layer, own, low.record_bytes)
    assert alone == (*known[:2], None)
    assert 0 < gates == expected.gates_over_layer
    assert 0 < known[0] < float("inf")


def test_a_policy_that_runs_without_what_it_welcomes_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = {}
    for name, machine in (("foresight-spec", None), ("foresight-spec", "t4"), ("lru", None)):
        settings(CacheOptions(policy=name, slots=2), DeviceOptions(machine=machine))
        told[name, machine] = capsys.readouterr().err
    assert told.pop(("foresight-spec", None)).startswith(
        "note: policy 'foresight-spec' welcomes 'speed'"
    )
    assert set(told.values()) == {""}
    both = [find_policy("lru"), find_policy("foresight-spec")]
    settings(CacheOptions(slots=2), DeviceOptions(), policies=both)
    assert capsys.readouterr().err.count("give --machine a profile") == 1


@pytest.mark.slow
def test_a_policy_that_asks_how_fast_the_machine_is_needs_a_profile(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(KNOWING)
    spec = f"{tmp_path}/mine.py:Mine"
    asked = ("generate", "--policy", spec, "--prompt", "hello", "--max-new-tokens", "2")
    done = moerun(*asked)
    assert done.returncode == 1
    assert "give --machine a profile of this machine, which 'moerun profile'" in done.stderr
    (tmp_path / "mine.toml").write_text(PROFILE.replace("1e9", "-1"))
    done = moerun(*asked, "--machine", f"{tmp_path}/mine.toml")
    assert done.returncode == 1
    assert f"--machine: {tmp_path}/mine.toml" in done.stderr
    assert "bytes_per_s is -1" in done.stderr
    done = moerun(*asked, "--machine", f"{tmp_path}/none.toml")
    assert done.returncode == 1
    assert "none.toml is not there" in done.stderr
    refused: Refusals = {}
    servable([find_policy(spec), find_policy("lru")], refused)
    assert list(refused) == [spec]
    assert servable([find_policy(spec)], {}, machine=True)


def moerun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moerun.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
