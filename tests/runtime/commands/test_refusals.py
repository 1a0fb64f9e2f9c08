"""Mistakes that are found before they cost anything, and results that outlive the later ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.profiling.compute import ComputeCost
from moerun.profiling.cpu import CpuCost
from moerun.profiling.link import LinkCost
from moerun.profiling.profiler import MachineProfile
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.runs import generate

MOERUN = (sys.executable, "-c", "from moerun.cli import main; main()")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "2bit", precision="2bit")


def moerun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MOERUN, *arguments], capture_output=True, text=True, check=False)


def test_tokens_of_another_model_are_refused(tiny: ExpertStore) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=2)) as runner:
        known = runner.model.get_input_embeddings().num_embeddings
        with pytest.raises(RunError, match=f"token {known}, and the model knows tokens below"):
            runner.generation().run(torch.tensor([[1, known]]), Sampling(max_new_tokens=2))
        assert generate(runner, "Once upon", Sampling(max_new_tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("command", [(), ("fidelity", "lru")])
def test_a_lower_precision_that_is_none_is_refused(
    tiny: ExpertStore, command: tuple[str, ...]
) -> None:
    prompt = () if command else ("--prompt", "hello")
    same = ("--model", str(tiny.path), "--low", str(tiny.path))
    done = moerun(*command, *prompt, *same)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: an expert takes 40,960 bytes")


@pytest.mark.slow
def test_a_bench_refuses_it_before_it_makes_any_weights() -> None:
    done = moerun("bench", "--shape", "tiny", "--precision", "2bit", "--low", "2bit")
    assert done.returncode == 2
    assert "--low 2bit is no lower than the experts' 2bit" in done.stderr
    assert "making" not in done.stderr


@pytest.mark.slow
def test_a_prediction_that_fails_takes_nothing_from_what_was_measured(tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text("[link]\nbytes_per_s = 1e-300\n")
    done = moerun(
        *("bench", "--shape", "tiny", "--policy", "lru", "--tokens", "2", "--warm-up", "0"),
        *("--rounds", "1", "--machine", str(machine), "--format", "json"),
    )
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["tokens_per_s"] > 0
    assert row["simulated_tokens_per_s"] is None
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: moesim could not simulate policy 'lru'")
    assert last.count("error:") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fidelity", "lru", "--machine", "no.toml"), "no.toml is not there"),
        (("fidelity", "lru", "--machine", "no/t4"), "no/t4 is not there"),
        (("profile", "--out", "no/a.toml"), "folder no does not exist"),
    ],
)
def test_files_are_looked_for_before_anything_is_measured(
    arguments: tuple[str, ...], message: str
) -> None:
    done = moerun(*arguments, "--model", "no-such-model-either")
    assert done.returncode == 1
    assert message in done.stderr
    assert "no-such-model-either" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--chunk", "3"], 2, "a chunk must be a multiple of 4096"),
        (["--streams", "4"], 2, "streams must be 1, 2 or 3"),
        (["--link-gbps", "0"], 2, "link-gbps must be above 0"),
        (["--scope", "planet"], 2, "unknown scope 'planet'"),
        (["--policy", "belady"], 1, "it runs in moesim, not live"),
    ],
)
def test_nothing_is_packed_for_a_run_that_cannot_be(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    place = tmp_path / "store"
    done = moerun("--precision", "2bit", "--store", str(place), "--prompt", "hello", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert not place.exists()


def test_a_disturbed_profile_says_so() -> None:
    profile = MachineProfile(
        name="mine",
        description="Measured.",
        link=LinkCost(bytes_per_s=1e9, latency_s=0.0, streams=1),
        compute=ComputeCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        cpu=CpuCost(1, 0.0, 0.0),
        device="cpu",
        waited=0.38,
    )
    assert "kept the measurement waiting for 38 %" in profile.note
    assert profile.note in profile.to_toml()
