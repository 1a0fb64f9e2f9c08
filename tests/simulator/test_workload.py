"""Traces cut into steps: the same whatever stretch of them is worked on at a time."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from moepolicy import NO_USE, clairvoyant
from moeroute import DECODE, PROMPT, open_trace
from moesim import Workload, load_workload, workload
from support.traces import write_trace


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
    monkeypatch.setattr(clairvoyant, "BLOCK", block)
    found = arrays(load_workload(open_trace(trace)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == value.dtype


def test_the_next_use_is_the_next_step_with_the_key(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clairvoyant, "BLOCK", 5)
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
    monkeypatch.setattr(clairvoyant, "BLOCK", 5)
    loaded = load_workload(open_trace(trace))
    n_keys = loaded.n_keys + 1  # one that nothing ever uses
    found = clairvoyant.first_use(loaded.keys, loaded.offsets, n_keys)
    expected = [NO_USE] * n_keys
    for step in reversed(range(loaded.n_steps)):
        for key in loaded.keys[loaded.offsets[step] : loaded.offsets[step + 1]].tolist():
            expected[key] = step
    assert found.tolist() == expected


def test_a_pass_begins_with_each_token_and_each_prompt(trace: Path) -> None:
    loaded = load_workload(open_trace(trace))
    assert int(loaded.begins_pass.sum()) == 3 * (1 + 7)
    assert set(loaded.layer[loaded.begins_pass].tolist()) == {0}
