"""The synthetic routing meets the published statistics, for the sample and for other seeds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moeroute import TraceError, open_trace
from moeroute.mixtral import compare_with_published, dense_bytes, expert_bytes
from moeroute.statistics import locality, read_routing, recall
from moeroute.synthetic import SAMPLE_TOKENS, write_synthetic
from moeroute.trace import SAMPLES


def test_the_sample_has_the_published_statistics() -> None:
    rows = compare_with_published(open_trace("mixtral-like"))
    assert len(rows) == 42
    wrong = [row for row in rows if abs(row.measured - row.published) > 0.02]
    assert not wrong


def test_other_seeds_have_them_too(tmp_path: Path) -> None:
    trace = write_synthetic(tmp_path / "t.parquet", tokens=3000, seed=11)
    trace.validate()
    for row in compare_with_published(trace):
        of_one_layer = "layer" in row.name or "largest" in row.name  # fewer tokens behind it
        assert row.measured == pytest.approx(row.published, abs=0.03 if of_one_layer else 0.02)


def test_layers_differ_as_the_real_ones_do() -> None:
    trace = open_trace("mixtral-like")
    by_layer = locality(read_routing(trace), (1,)).by_layer[:, 0]
    assert by_layer.min() == pytest.approx(0.260, abs=0.02)
    assert by_layer.max() == pytest.approx(0.449, abs=0.02)
    found = recall(trace, (2,)).by_layer[:, 0]
    assert np.isnan(found[0, 0])
    assert np.isnan(found[2, :3]).all()
    assert (found[0, 5:] > 0.78).all()
    assert (found[0, 5:] < 0.96).all()
    assert (np.diff(found[:, 3:], axis=0) < 0).all()  # further ahead, less is known


def test_equal_seeds_make_equal_traces_and_shorter_ones_their_start(tmp_path: Path) -> None:
    long = write_synthetic(tmp_path / "a.parquet", tokens=300, seed=5)
    assert write_synthetic(tmp_path / "b.parquet", tokens=300, seed=5).digest == long.digest
    short = write_synthetic(tmp_path / "c.parquet", tokens=130, seed=5)
    assert short.n_rows == 130 * 32
    for name in short.columns:
        start = long.array(name)[: short.n_rows]
        np.testing.assert_array_equal(short.array(name), start)
    other = write_synthetic(tmp_path / "d.parquet", tokens=130, seed=6)
    assert (other.array("experts") != short.array("experts")).mean() > 0.5


def test_the_sample_is_what_the_command_makes(tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    command = [sys.executable, "-m", "moeroute.synthetic", "--seed", "0", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "LRU, 4 experts" in done.stdout
    made, sample = open_trace(out), open_trace("mixtral-like")
    assert replace(made.meta, packages=sample.meta.packages) == sample.meta
    assert made.n_rows == sample.n_rows == SAMPLE_TOKENS * 32
    # Other machines' tanh may round a few logits otherwise.
    same = made.array("router_logits") == sample.array("router_logits")
    assert same.mean() > 0.999
    assert (SAMPLES / "mixtral-like.parquet").stat().st_size <= 4_000_000


def test_it_is_consistent_in_itself() -> None:
    trace = open_trace("mixtral-like")
    trace.validate()
    column = trace.arrays("experts", "weights", "router_logits")
    logits = column["router_logits"].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(order, column["experts"])
    chosen = np.exp(np.take_along_axis(logits, order, axis=1))
    np.testing.assert_allclose(chosen / chosen.sum(axis=1, keepdims=True), column["weights"], 1e-6)


def test_it_says_that_it_is_synthetic() -> None:
    trace = open_trace("mixtral-like")
    assert trace.meta.source == "synthetic"
    assert trace.title == "mixtral-8x7b (synthetic)"
    assert "synthetic: generated from seed 0, not recorded" in trace.describe()


def test_sizes_are_those_of_the_base_paper() -> None:
    megabytes = {name: round(size / 1e6, 1) for name, size in expert_bytes().items()}
    assert megabytes == {"2bit": 66.7, "3bit": 76.1, "4bit": 93.7, "fp16": 352.3}
    # 45.1 of 46.7 billion parameters are experts'; the rest, 4-bit attention, is small.
    assert round(32 * 8 * expert_bytes()["fp16"] / 2 / 1e9, 1) == 45.1
    assert dense_bytes().layer_bytes == pytest.approx(22.4e6, rel=0.01)


def test_bad_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no synthetic model 'gpt'; there are: mixtral-8x7b"):
        write_synthetic(tmp_path / "t", name="gpt")
    with pytest.raises(TraceError, match="cannot generate 0 tokens"):
        write_synthetic(tmp_path / "t", tokens=0)
    command = [sys.executable, "-m", "moeroute.synthetic", "--out", str(tmp_path / "no" / "t")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
