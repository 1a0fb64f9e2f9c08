"""Fitting policies: what is fitted on what, the file it is kept in, and no score on the same."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moepolicy import Context, PolicyError, PolicyUsageError, Step, find_policy
from moepolicy.fitted import ABOUT, read_fitted, write_fitted
from moepolicy.interface import can_be_fitted
from moepolicy.library import BUILT_IN
from moepolicy.library.learned.flashmoe import train
from moepolicy.library.learned.promoe import ProMoe
from moeroute import open_trace
from moesim import compare, load_machine, load_workload, simulate
from moesim.commands.fit import FITTABLE
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.errors import SimulationError, UsageError
from moesim.fitting import draw_sequences, fit, fitted_sequences
from safetensors.numpy import load_file, save_file

TINY = "tiny"  # 17 sequences of 8 layers of 8 experts


@pytest.fixture(scope="module")
def flashmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FlashMoE fitted on half of the sample's sequences."""
    path = tmp_path_factory.mktemp("fit") / "flashmoe.safetensors"
    fitting = fit(find_policy("flashmoe"), open_trace(TINY), seed=3)
    write_fitted(path, fitting.arrays, fitting.of)
    return path


def test_the_help_names_the_policies_that_can_be_fitted() -> None:
    assert tuple(name for name, policy in BUILT_IN.items() if can_be_fitted(policy)) == FITTABLE


def test_sequences_are_drawn_by_the_seed() -> None:
    assert draw_sequences(17, 0.5, 3) == draw_sequences(17, 0.5, 3)
    assert draw_sequences(17, 0.5, 3) != draw_sequences(17, 0.5, 4)
    assert draw_sequences(4, 1.0, 0) == [0, 1, 2, 3]
    assert [len(draw_sequences(4, share, 0)) for share in (0.01, 0.5, 0.99)] == [1, 2, 3]
    with pytest.raises(SimulationError, match="one sequence, of which none would be left"):
        draw_sequences(1, 0.5, 0)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(SimulationError, match="share must be above 0"):
            draw_sequences(4, share, 0)


def test_some_sequences_of_a_workload_are_those_sequences() -> None:
    workload = load_workload(open_trace(TINY), logits=True, token_ids=True, rows=True)
    parts = list(workload.sequences())
    some = workload.only([1, 4])
    assert some.starts.tolist() == [0, parts[1].n_steps]
    for number in (0, 9, parts[1].n_steps - 1):
        assert_alike(some.step(number), parts[1].step(number), number)
    second = parts[1].n_steps
    for number in (0, 8, parts[4].n_steps - 1):
        assert_alike(some.step(second + number), parts[4].step(number), second + number)
    assert [part.n_steps for part in some.sequences()] == [parts[1].n_steps, parts[4].n_steps]


def assert_alike(found: Step, expected: Step, number: int) -> None:
    for name, value in expected._replace(number=number)._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_the_file_says_what_it_was_fitted_on_and_the_fit_repeats(flashmoe: Path) -> None:
    found = read_fitted(flashmoe, "flashmoe")
    trace = open_trace(TINY)
    assert (found.of.trace, found.of.n_sequences, found.of.seed) == (trace.digest, 17, 3)
    assert len(found.of.sequences) == 8
    again = fit(find_policy("flashmoe"), trace, seed=3).arrays
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array, again[name])


def test_a_policy_is_not_scored_on_what_it_was_fitted_on(flashmoe: Path) -> None:
    spec = f"flashmoe:params={flashmoe}"
    with pytest.raises(SimulationError, match="was fitted on 8 sequences of tiny: --held-out"):
        compare(TINY, ["lru", spec], slots=4)
    held_out = compare(TINY, ["lru", spec], slots=4, held_out=True)
    everything = compare(TINY, ["lru", spec], slots=4, fitted_too=True)
    workload = load_workload(open_trace(TINY))
    fitted = fitted_sequences(open_trace(TINY), [find_policy(spec)])
    left = [part for i, part in enumerate(workload.sequences()) if i not in fitted]
    assert held_out["requests"].to_list() == [sum(len(part.keys) for part in left)] * 2
    assert everything["requests"].to_list() == [len(workload.keys)] * 2
    with pytest.raises(UsageError, match="none of these policies was fitted"):
        compare(TINY, ["lru"], slots=4, held_out=True)
    # Another trace's sequences are not those.
    other = compare("mixtral-like", ["lru"], slots=4, tokens=20)
    assert len(other) == 1


def test_a_fitted_policy_decides_alike_in_every_engine(flashmoe: Path, tmp_path: Path) -> None:
    promoe = tmp_path / "promoe.safetensors"
    fitting = fit(find_policy("promoe"), open_trace(TINY), share=0.3)
    write_fitted(promoe, fitting.arrays, fitting.of)
    workload = load_workload(open_trace(TINY), logits=True).head(60)
    never = Compilations(worth_compiling=10**12, worth_loading=10**12)
    compiling = Compilations(worth_compiling=0)
    ways = ((Engine.simpy, never), (Engine.replay, never), (Engine.replay, compiling))
    for policy in (f"flashmoe:params={flashmoe}", f"promoe:params={promoe},rate=0"):
        rows = [
            simulate(
                workload,
                find_policy(policy),
                load_machine("t4"),
                slots=3,
                engine=engine,
                compilations=known,
                limits=False,
            ).row()
            for engine, known in ways
        ]
        assert rows[0] == rows[1] == rows[2]
    assert not compiling.interpreted


def test_promoe_fits_the_map_from_one_layer_to_the_next() -> None:
    """Two experts a layer: layer 1 uses the other one than the gate of layer 0 is sure of."""
    context = Context(n_layers=2, n_experts=2, top_k=1, slots=1)

    def steps() -> Any:
        nothing = np.empty((0, 0), np.float32)
        one = np.ones(1, np.float32)
        for token in range(40):
            first = token % 2
            sure = np.full(2, -9, np.float32)
            sure[first] = 9.0
            yield Step(2 * token, 0, np.array([first], np.int32), one, sure, nothing, 1)
            used = np.array([2 + 1 - first], np.int32)
            yield Step(2 * token + 1, 1, used, one, sure, nothing, 1)

    arrays = ProMoe.fit(context, steps(), np.random.default_rng(0))
    policy = ProMoe(context, n=1, rate=0.0, params=arrays)
    keys = np.zeros(4, np.int32)
    for step in list(steps())[:2:2]:
        policy.on_step(step)
        assert policy.prefetch(step, keys) == 1
        assert keys[0] == 2 + 1 - step.experts[0]


def test_flashmoe_s_network_learns_what_it_is_shown() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.random((4000, 2))
    target = np.maximum(0.9 * inputs[:, 0] - 0.3 * inputs[:, 1], 0)
    inner, offset, outer = train(np.column_stack([inputs, target]), rng)

    def error(inner: Any, offset: Any, outer: Any) -> float:
        made = np.maximum(inputs @ inner.T + offset, 0) @ outer
        return float(np.mean((made - target) ** 2))

    start = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]], np.zeros(4), np.full(4, 0.25)
    assert error(inner, offset, outer) < 0.02 * error(np.array(start[0]), *start[1:])


def rewrite(path: Path, to: Path, **changes: Any) -> Path:
    """A params file with another description."""
    about = json.loads(open_about(path)) | changes
    save_file(load_file(path), to, metadata={ABOUT: json.dumps(about)})
    return to


def open_about(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        found: str = file.metadata()[ABOUT]
    return found


def test_a_params_file_that_does_not_fit_is_refused_by_what_differs(
    flashmoe: Path, tmp_path: Path
) -> None:
    def refused(path: Path, policy: str = "flashmoe") -> str:
        with pytest.raises(PolicyError) as error:
            find_policy(f"{policy}:params={path}").build(Context(8, 8, 2, 4))
        return str(error.value)

    assert "there is no params file" in refused(tmp_path / "none.safetensors")
    assert "holds the parameters of 'flashmoe'" in refused(flashmoe, "promoe")
    other = rewrite(flashmoe, tmp_path / "other.safetensors", n_experts=16, model="big")
    said = refused(other)
    assert "fitted on big, 8 layers of 16 experts, top-2, and this model has 8 layers" in said
    damaged = tmp_path / "damaged.safetensors"
    for n in (0, 5, 100, flashmoe.stat().st_size - 1):
        damaged.write_bytes(flashmoe.read_bytes()[:n])
        assert f"{damaged} is damaged" in refused(damaged)
    save_file({"inner": np.zeros(3)}, damaged)
    assert "is no params file of 'moesim fit'" in refused(damaged)
    assert "is damaged" in refused(rewrite(flashmoe, damaged, seed="x"))
    arrays = load_file(flashmoe)
    arrays["outer"][0, 0] = np.nan
    save_file(arrays, damaged, metadata={ABOUT: open_about(flashmoe)})
    assert "array 'outer' is not finite" in refused(damaged)
    with pytest.raises(PolicyUsageError, match="policy 'lru' has no parameter 'params'"):
        find_policy(f"lru:params={flashmoe}")


def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_fits_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "promoe.safetensors"
    done = moesim("fit", "promoe", "--out", str(out))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())  # wrapped, where the file's name is long
    assert "promoe fitted on 8 of 17 sequences of tiny (seed 0), 9 held out" in said
    spec = f"promoe:params={out}"
    refused = moesim("compare", "lru", spec, "--slots", "4")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "--held-out" in refused.stderr
    shown = moesim("compare", "lru", spec, "--slots", "4", "--held-out")
    assert shown.returncode == 0, shown.stderr
    again = moesim("fit", "promoe", "--out", str(out))
    assert again.returncode == 1
    assert "--force replaces it" in again.stderr
    for arguments, said in (
        (
            ("lru", "--out", str(tmp_path / "l.safetensors")),
            "has nothing that is fitted; these have: edgemoe, ",
        ),
        (("promoe", "--out", str(tmp_path / "p.npz")), "the suffix says the format"),
    ):
        failed = moesim("fit", *arguments)
        assert failed.returncode in (1, 2)
        assert said in failed.stderr
    assert sorted(tmp_path.iterdir()) == [out]


def test_params_that_do_not_fit_on_the_disk_leave_no_file(
    flashmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = read_fitted(flashmoe, "flashmoe")

    def full(file: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"p\.safetensors"):
        write_fitted(tmp_path / "p.safetensors", fitted.arrays, fitted.of)
    assert list(tmp_path.iterdir()) == []
