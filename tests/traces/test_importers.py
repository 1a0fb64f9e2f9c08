"""Foreign formats: what is kept, what is dropped and said so, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moeroute import TraceError
from moeroute.importers import import_bigmoe_csv, import_foreign, import_npz

CSV = """\
# route_trace v1
# model=/data/Some-MoE-Q4_K_M.gguf arch=some n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=30
# layer=1 expert_bytes=120 dense_bytes=50
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,1,0.5,0,0
0,0,1,0,1,2,0.5,0,100
0,0,1,1,0,0,0.9,0,120
0,0,1,1,1,2,0.1,0,120
0,1,2,0,0,2,0.6,1,0
0,1,2,0,1,0,0.4,0,100
0,1,2,1,0,1,0.6,2,0
0,1,2,1,1,0,0.4,1,0
"""


def arrays() -> dict[str, Any]:
    """Three tokens of two layers, top-2 of 5, out of order; the last has lost layer 0."""
    return {
        "ids": np.array([[[4, 0], [1, 2]], [[0, 3], [2, 1]], [[-1, -1], [3, 0]]], dtype=np.int16),
        "weights": np.array([[[0.75, 0.25]] * 2] * 3, dtype=np.float16),
        "seq": np.array([1, 0, 1]),
        "pos": np.array([7, 3, 8]),
        "phase": np.array([1, 0, 1]),
        "valid": np.array([[1, 1], [1, 1], [0, 1]], dtype=bool),
        "n_experts": np.array(5),
        "top_k": np.array(2),
        "finished": np.array([True]),
    }


def save(path: Path, **changes: Any) -> Path:
    changed = {name: array for name, array in (arrays() | changes).items() if array is not None}
    np.savez_compressed(path, **changed)
    return path


def test_npz(tmp_path: Path) -> None:
    trace = import_foreign(save(tmp_path / "route.npz"), tmp_path / "t.parquet")
    trace.validate()
    meta = trace.meta
    assert (meta.source, meta.model, meta.missing_rows) == ("imported", "route", 1)
    assert (meta.n_layers, meta.n_experts, meta.top_k) == (2, 5, 2)
    assert meta.notes["not_imported"] == "arrays finished"
    # The file has a token of sequence 1, one of sequence 0, and another of 1: its order is kept.
    assert trace.array("sequence").tolist() == [0, 0, 0, 1, 1]
    assert trace.array("position").tolist() == [7, 7, 8, 3, 3]
    assert trace.array("phase").tolist() == [1, 1, 1, 0, 0]
    assert trace.array("pass_id").tolist() == [0, 0, 2, 1, 1]
    assert trace.array("layer").tolist() == [0, 1, 1, 0, 1]
    assert trace.array("experts").tolist() == [[4, 0], [1, 2], [3, 0], [0, 3], [2, 1]]
    assert trace.array("weights").tolist() == [[0.75, 0.25]] * 5
    assert not trace.has("token_id")


def test_npz_without_optional_arrays(tmp_path: Path) -> None:
    ids = arrays()["ids"].clip(min=[[1, 0], [1, 0]])
    path = save(tmp_path / "r.npz", ids=ids, weights=None, valid=None, top_k=None, finished=None)
    trace = import_npz(path, tmp_path / "t.parquet", model="some")
    trace.validate()
    assert (trace.meta.missing_rows, trace.meta.model) == (0, "some")
    assert not trace.has("weights")


def test_npz_with_a_token_wholly_lost(tmp_path: Path) -> None:
    valid = arrays()["valid"]
    valid[2] = False
    trace = import_npz(save(tmp_path / "r.npz", valid=valid), tmp_path / "t.parquet")
    trace.validate()
    assert trace.meta.missing_rows == 0
    assert trace.meta.notes["lost_tokens"].startswith("1 of 3 tokens dropped")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq": None}, "no array seq; it has finished, ids"),
        (
            {"n_experts": np.array(4)},
            "token 0, layer 0, column experts: expert 4 is out of range (there are 4)",
        ),
        (
            {"pos": np.array([7, 3, 7])},
            "token 0, layer 1 and token 2, layer 1 are both sequence 1, position 7, layer 1, but "
            "differ in experts",
        ),
        ({"phase": np.array([1, 2, 1])}, "token 1, layer 0, column phase: 2 is no phase"),
        ({"seq": np.array([1, 0])}, "array seq is int64[2], not whole numbers [3]"),
        ({"weights": np.ones((3, 2, 2), dtype=int)}, "array weights is int64[3, 2, 2], not real"),
        ({"weights": np.full((3, 2, 2), np.nan)}, "token 0, layer 0, column weights: [nan, nan]"),
        ({"ids": np.zeros((3, 2))}, "array ids has shape [3, 2]"),
        ({"top_k": np.array(3)}, "top_k is 3, but ids holds 2"),
        ({"seq": np.array([-1, 0, 1])}, "token 0, layer 0, column sequence: -1 is out of range"),
        ({"pos": np.array([7, 1 << 32, 8])}, "token 1, layer 0, column position: 4294967296 is"),
        ({"weights": np.full((3, 2, 2), None)}, "array weights holds Python objects, which are"),
        ({"valid": np.zeros((3, 2), bool)}, "holds no routing: 3 tokens, 3 of them lost"),
        (
            {"ids": np.array([[[4, 0], [1, 2]], [[0, 3], [2, 2]], [[0, 1], [3, 0]]])},
            "token 1, layer 1, column experts: expert 2 is there more than once",
        ),
    ],
)
def test_a_bad_npz_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(TraceError) as caught:
        import_npz(path, tmp_path / "t.parquet")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.npz"]


def test_a_truncated_npz_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "bad.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(TraceError, match=r"bad\.npz: truncated or damaged zip"):
        import_foreign(path, tmp_path / "t.parquet")


def test_bigmoe_csv(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(CSV)
    trace = import_foreign(tmp_path / "r.csv", tmp_path / "t.parquet")
    trace.validate()
    meta = trace.meta
    assert meta.model == "Some-MoE-Q4_K_M"
    assert meta.expert_bytes == {"q4_k_m": 120}
    assert json.loads(meta.notes["expert_bytes_by_layer"]) == [100, 120]
    assert (meta.layer_bytes, meta.missing_rows) == (40, 1)
    assert trace.array("position").tolist() == [0, 1, 1, 2, 2]
    assert trace.array("phase").tolist() == [0, 0, 0, 1, 1]
    assert trace.array("layer").tolist() == [0, 0, 1, 0, 1]
    assert trace.array("experts").tolist() == [[3, 1], [1, 2], [0, 2], [2, 0], [1, 0]]
    assert trace.array("residency").tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [2, 1]]
    assert trace.array("loaded_bytes").tolist()[:3] == [[100, 100], [0, 100], [120, 120]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,x,0.5", "line 8, column expert: 'x' is no number"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,1,", "line 8, column weight: None is no number"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,9,0.5", "line 8, column expert: '9' is out of range"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,-1,0.5", "line 8, column expert: '-1' is out of range"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,1.5,0.5", "line 8, column expert: '1.5' is out of range"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,1,nan", "line 8, column weight: 'nan' is no number"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,0,2,0.5", "line 8, column experts: expert 2 is there more"),
        ("0,0,1,0,0,1,0.5", "\n0,0,1,0,0,x,0.5", "line 9, column expert: 'x' is no number"),
        (",residency", ",residency,Layer", "column layer is there 2 times"),
        ("0,0,1,0,0,1,0.5", "0,0,1,0,1,1,0.5", "line 8, column slot"),
        ("0,1,2,1,1,0,0.4,1,0\n", "", "line 14, column slot"),
        ("0,1,2,1,0,1,0.6,2,0\n0,1,2,1,1,0,0.4,1,0\n", "", "decode step 2 of turn 0 has 1 of 2"),
        (",residency", ",cached", "no column residency"),
        ("0,0,0,0,0,3,0.75,0,100", "0,0,0,0,0,3,0.75,0,100,5", "more fields than"),
        ("n_expert=4 ", "", "do not say n_expert="),
        ("n_expert=4 ", "n_expert=many ", "comment lines are damaged"),
        ("n_expert_used=2", "n_expert_used=0", "n_expert_used=0"),
        (CSV[CSV.index("0,0,0,0,0") :], "", "has no rows"),
    ],
)
def test_a_bad_csv_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CSV
    path = tmp_path / "bad.csv"
    path.write_text(CSV.replace(old, new, 1))
    with pytest.raises(TraceError) as caught:
        import_bigmoe_csv(path, tmp_path / "t.parquet")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.csv"]


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with pytest.raises(TraceError, match="no such file"):
        import_foreign(path, tmp_path / "t.parquet")
    path.write_bytes(b"hello")
    with pytest.raises(TraceError, match="'hello': not a format that is known by its content"):
        import_foreign(path, tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="line 1: not a route trace"):
        import_bigmoe_csv(path, tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "n_tokens", "missing_rows"),
    [("gemma", 157, 0), ("gptoss", 149, 84), ("qwen", 156, 27)],
)
def test_the_real_route_traces(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    n_tokens: int,
    missing_rows: int,
) -> None:
    source = shared_data / f"bigmoe_{name}.route.csv"
    trace = import_foreign(source, tmp_path / "t.parquet")
    trace.validate()
    meta = trace.meta
    assert meta.missing_rows == missing_rows  # the prompt's last layer, all tokens but the last
    assert trace.n_rows == n_tokens * meta.n_layers - missing_rows
    lines = [line for line in source.read_text().splitlines() if line[0].isdigit()]
    assert int(trace.array("loaded_bytes").sum()) == sum(int(line.split(",")[8]) for line in lines)
    assert trace.array("residency").sum() == sum(int(line.split(",")[7]) for line in lines)


def test_the_real_npz(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "gpt_oss_20b_64seq.npz"
    trace = import_foreign(source, tmp_path / "t.parquet")
    trace.validate()
    ids = np.load(source)["ids"]
    np.testing.assert_array_equal(trace.array("experts").reshape(ids.shape), ids)
    assert "seq_names" in trace.meta.notes["not_imported"]
