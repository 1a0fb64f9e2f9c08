"""Traces as other programs' files, and files of counts as what calibrates policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moepolicy
import moesim
import numpy as np
import pytest
from moeroute import Rows, Trace, TraceError, TraceMeta, TraceWriter, export, open_trace
from moeroute.importers import import_foreign
from moeroute.schema import NO_EXPERT
from moeroute.uses import uses_of

torch = pytest.importorskip("torch")


@pytest.fixture
def ragged(tmp_path: Path) -> Trace:
    """Three tokens of two layers: top-2 or fewer of 4 experts; the last has lost layer 0."""
    meta = TraceMeta(
        source="imported",
        model="m",
        n_layers=2,
        n_experts=4,
        top_k=2,
        variable_top_k=True,
        missing_rows=1,
        expert_bytes={"4bit": 100},
        notes={"model_layers": "[1, 3]"},
    )
    experts = [[0, 1], [2, NO_EXPERT], [3, 0], [1, 2], [2, 3]]
    rows = Rows(
        sequence=np.zeros(5, np.uint32),
        position=np.array([0, 0, 1, 1, 2], np.uint32),
        phase=np.array([0, 0, 1, 1, 1], np.uint8),
        token_id=np.array([7, 7, 8, 8, 9], np.uint32),
        layer=np.array([0, 1, 0, 1, 1], np.uint16),
        experts=np.array(experts, np.uint16),
        weights=np.array([[0.7, 0.3], [1, 0], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], np.float32),
        router_logits=np.arange(20, dtype=np.float16).reshape(5, 4),
        pass_id=np.array([0, 0, 1, 1, 1], np.uint32),
    )
    with TraceWriter(tmp_path / "ragged.parquet", meta) as writer:
        writer.write(rows)
    trace = open_trace(tmp_path / "ragged.parquet")
    trace.validate()
    return trace


COUNTS = [[2, 1, 0, 1], [0, 1, 3, 1]]


def test_counts_stand_at_the_models_layers(ragged: Trace, tmp_path: Path) -> None:
    assert ragged.expert_counts().tolist() == COUNTS
    none = [0, 0, 0, 0]
    expected = [[none, COUNTS[0], none, COUNTS[1]]]
    export.write_counts(ragged, tmp_path / "c.json", ".json")
    assert json.loads((tmp_path / "c.json").read_text()) == {"logical_count": expected}
    export.write_counts(ragged, tmp_path / "c.pt", ".pt")
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    assert found["logical_count"].tolist() == expected
    tiny = open_trace("tiny")
    assert export.logical_counts(tiny, 2).shape == (1, tiny.meta.n_layers + 2, tiny.meta.n_experts)


def test_json_lines_come_back(ragged: Trace, tmp_path: Path) -> None:
    export.write_lines(ragged, tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[1] == {
        **{"sequence": 0, "position": 0, "phase": "prompt", "pass_id": 0, "token_id": 7},
        **{"layer": 1, "experts": [2], "weights": [1.0]},
    }
    again = import_foreign(tmp_path / "r.jsonl", tmp_path / "again.parquet")
    again.validate()
    for name in ("sequence", "position", "phase", "token_id", "layer", "experts", "weights"):
        np.testing.assert_array_equal(again.array(name), ragged.array(name), err_msg=name)
    assert again.meta.variable_top_k


@pytest.mark.slow
def test_npz_comes_back_whole(ragged: Trace, tmp_path: Path, monkeypatch: Any) -> None:
    for trace, batch_rows in ((ragged, 2), (open_trace("tiny"), 3000)):
        monkeypatch.setattr(export, "_BATCH_ROWS", batch_rows)
        export.write_npz(trace, tmp_path / "r.npz")
        again = import_foreign(tmp_path / "r.npz", tmp_path / "again.parquet")
        again.validate()
        assert again.columns == trace.columns
        for name in trace.columns:
            np.testing.assert_array_equal(again.array(name), trace.array(name), err_msg=name)
        for name in ("model", "n_experts", "top_k", "missing_rows", "layer_bytes"):
            assert getattr(again.meta, name) == getattr(trace.meta, name), name
        assert again.meta.weight_rule == (None if trace is ragged else "softmax-topk-renorm")
        assert again.meta.precision == trace.meta.precision


def physical(path: Path) -> Path:
    """Uses of physical experts in two passes; experts 0 and 4 of layer 0 are one logical expert."""
    table = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 2, 3, 1]])
    passes = [[[1, 1, 0, 0, 1], [0, 0, 2, 1, 1]], [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]]
    records = [{"global_physical_count": torch.tensor(count)} for count in passes]
    torch.save({"records": records, "last_physical_to_logical_map": table}, path)
    return path


def test_files_of_counts_are_read_as_uses(ragged: Trace, tmp_path: Path) -> None:
    export.write_counts(ragged, tmp_path / "c.json", ".json")
    export.write_counts(ragged, tmp_path / "c.pt", ".pt")
    np.save(tmp_path / "c.npy", np.array([COUNTS], np.float32))
    load = torch.tensor([COUNTS, np.zeros_like(COUNTS).tolist()])
    torch.save({"expert_load_window": load}, tmp_path / "load.pt")
    for path in (
        *(tmp_path / name for name in ("c.json", "c.pt", "c.npy", "load.pt")),
        physical(tmp_path / "p.pt"),
        ragged.path,
    ):
        assert uses_of(path).counts.tolist() == COUNTS, path
    assert uses_of("tiny").counts.tolist() == open_trace("tiny").expert_counts().tolist()
    for name, thing, message in (
        ("x.pt", {"logical_count": "many"}, "logical_count is no table of numbers, not"),
        ("y.pt", {"logical_count": torch.full((2, 3), -1)}, "numbers that count nothing"),
        ("z.pt", {"records": [{"global_physical_count": torch.ones(2)}]}, r"of shape \[2\], not"),
    ):
        torch.save(thing, tmp_path / name)
        with pytest.raises(TraceError, match=message):
            uses_of(tmp_path / name)


def test_counts_calibrate_a_simulation(tmp_path: Path) -> None:
    tiny = open_trace("tiny")
    export.write_counts(tiny, tmp_path / "c.json", ".json")
    counting = next(
        name
        for name in moepolicy.policy_names()
        if "counts" in moepolicy.find_policy(name).requires
    )
    how: dict[str, Any] = {"slots": 4, "tokens": 30, "engine": "simpy"}
    by_trace = moesim.compare(tiny, [counting], calibration="tiny", **how)
    by_file = moesim.compare(tiny, [counting], calibration=tmp_path / "c.json", **how)
    assert by_file["hits"].to_list() == by_trace["hits"].to_list()
