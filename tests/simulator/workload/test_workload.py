"""Traces cut into steps: the same whatever stretch of them is worked on at a time."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from moepolicy import NO_USE, find_policy
from moepolicy.library.clairvoyant import future
from moeroute import DECODE, PROMPT, open_trace
from moesim import Workload, load_machine, load_workload, simulate, workload_for
from moesim.workload import loading
from moesim.workload import steps as workload
from support.traces import write_trace

simulate_module = importlib.import_module("moesim.simulation")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three sequences, each a prompt and decoded tokens."""
    rng = np.random.default_rng(0)
    tokens = [
        (sequence, phase, [rng.permutation(5)[:2].tolist() for _ in range(3)])
        for sequence in range(3)
        for phase in [PROMPT] * 4 + [DECODE] * 7
    ]
    return write_trace(tmp_path / "t.parquet", tokens, 5)


def arrays(loaded: Workload) -> dict[str, np.ndarray]:
    names = [field.name for field in fields(loaded)] + ["next_use", "begins_pass"]
    found = {name: getattr(loaded, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_blocks_change_nothing(trace: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = arrays(load_workload(open_trace(trace)))
    monkeypatch.setattr(workload, "BLOCK", block)
    monkeypatch.setattr(loading, "BLOCK_ROWS", block)
    monkeypatch.setattr(future, "BLOCK", block)
    found = arrays(load_workload(open_trace(trace)))
    assert_same(found, expected)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize("block", [1, 10, 1000])
def test_a_workload_in_files_is_the_same_and_stays_so(
    trace: Path, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_workload(open_trace(trace))
    monkeypatch.setattr(workload, "BLOCK", block)
    monkeypatch.setattr(loading, "BLOCK_ROWS", block)
    monkeypatch.setattr(future, "BLOCK", block)
    folder = tmp_path / "w"
    folder.mkdir()
    load_workload(open_trace(trace), folder=folder)
    found = loading.attached(folder)
    shutil.rmtree(folder)  # what is mapped stays
    assert {"next_use", "begins_pass", "counts", "extent", "n_prompt"} <= vars(found).keys()
    for _ in range(2):  # before what is in memory is let go, and after
        assert_same(arrays(found), arrays(expected))
        found.release()
    assert (found.n_decoded, found.n_prompt) == (expected.n_decoded, expected.n_prompt) == (21, 12)
    assert found.extent == expected.extent
    np.testing.assert_array_equal(found.counts, expected.counts)
    runs = [
        simulate(of, find_policy("belady"), load_machine("t4"), slots=2, cold=cold)
        for of in (found, expected)
        for cold in (False, True)
    ]
    assert runs[:2] == runs[2:]


def test_a_long_trace_is_not_held_in_memory(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    spec = find_policy("lru")
    held = workload_for(open_trace(trace), [spec])
    monkeypatch.setattr(simulate_module, "IN_MEMORY", 5)
    mapped = workload_for(open_trace(trace), [spec])
    assert (len(held.maps), len(mapped.maps)) == (0, 12)
    assert not list((tmp_path / "tmp").iterdir())
    assert_same(arrays(mapped), arrays(held))


def test_the_next_use_is_the_next_step_with_the_key(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(future, "BLOCK", 5)
    loaded = load_workload(open_trace(trace))
    demands = [
        loaded.keys[loaded.offsets[step] : loaded.offsets[step + 1]].tolist()
        for step in range(loaded.n_steps)
    ]
    for step, demand in enumerate(demands):
        for rank, key in enumerate(demand):
            later = (s for s in range(step + 1, len(demands)) if key in demands[s])
            assert loaded.next_use[loaded.offsets[step] + rank] == next(later, NO_USE)


def test_the_first_use_is_the_first_step_with_the_key(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(future, "BLOCK", 5)
    loaded = load_workload(open_trace(trace))
    n_keys = loaded.n_keys + 1  # one that nothing ever uses
    found = future.first_use(loaded.keys, loaded.offsets, n_keys)
    expected = [NO_USE] * n_keys
    for step in reversed(range(loaded.n_steps)):
        for key in loaded.keys[loaded.offsets[step] : loaded.offsets[step + 1]].tolist():
            expected[key] = step
    assert found.tolist() == expected


def test_a_pass_begins_with_each_token_and_each_prompt(trace: Path) -> None:
    loaded = load_workload(open_trace(trace))
    assert int(loaded.begins_pass.sum()) == 3 * (1 + 7)
    assert set(loaded.layer[loaded.begins_pass].tolist()) == {0}
