"""Bad traces: each is refused with the file, the row and the column."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from moeroute import Rows, TraceError, TraceMeta, open_trace, sample_names
from moeroute.schema import META_KEY
from moeroute.statistics import read_routing
from moesim.workload.loading import load_workload
from support.tracekit import make_meta, make_rows, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "t.parquet"
    meta = make_meta(horizon=1)
    write(path, meta, make_rows(meta))
    return path


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], **meta: Any) -> None:
    """Change a trace behind the writer's back."""
    stored = json.loads(pl.read_parquet_metadata(path)[META_KEY]) | meta
    change(pl.read_parquet(path)).write_parquet(path, metadata={META_KEY: json.dumps(stored)})


def set_cell(name: str, row: int, value: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    def change(frame: pl.DataFrame) -> pl.DataFrame:
        values = frame[name].to_list()
        values[row] = value
        return frame.with_columns(pl.Series(name, values, dtype=frame[name].dtype))

    return change


NAN = float("nan")
BAD_CELLS = [
    ("experts", 17, [4, 1], "row 17, column experts: expert 4 is out of range (there are 4)"),
    ("experts", 20, [2, 2], "row 20, column experts: expert 2 is there more than once"),
    ("weights", 3, [NAN, 0.1], "row 3, column weights: [nan, 0.1] is not finite"),
    ("weights", 5, [0.25, 0.75], "row 5, column weights: [0.25, 0.75] is not in descending order"),
    ("layer", 8, 3, "row 8, column layer: layer 3 is out of range (there are 3)"),
    ("layer", 7, 0, "column sequence, position, layer: (0, 2, 0) does not come after (0, 2, 0)"),
    ("position", 12, 1, "row 12, column sequence, position, layer: (0, 1, 0) does not come"),
    ("sequence", 29, 0, "row 29, column sequence, position, layer"),
    ("router_logits", 2, [0.0, NAN, 0.0, 0.0], "row 2, column router_logits: there is a NaN"),
    ("predicted_logits_1", 2, [NAN, 0, 0, 0], "row 2, column predicted_logits_1: there is a NaN"),
    ("predicted_logits_1", 2, [0, 0, NAN, 0], "row 2, column predicted_logits_1: there is a NaN"),
    ("predicted_logits_1", 2, [NAN, NAN, NAN, 0], "row 2, column predicted_logits_1: there is a"),
    ("input_norm", 9, NAN, "row 9, column input_norm: nan is not finite"),
    ("token_id", 6, None, "row 6, column token_id: there is no value"),
    ("experts", 6, None, "row 6, column experts: there is no value"),
    ("experts", 6, [None, 1], "column experts: a list has a hole"),
]


@pytest.mark.parametrize(("column", "row", "value", "message"), BAD_CELLS)
def test_a_bad_cell_is_told_by_row_and_column(
    path: Path, column: str, row: int, value: Any, message: str
) -> None:
    rewrite(path, set_cell(column, row, value))
    with pytest.raises(TraceError) as caught:
        open_trace(path).validate()
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("gone", [0, 4, 14, 29])
def test_missing_layers_are_found(path: Path, gone: int) -> None:
    rewrite(path, lambda f: pl.concat([f[:gone], f[gone + 1 :]]))
    with pytest.raises(TraceError, match="rows are missing"):
        open_trace(path).validate()
    rewrite(path, lambda f: f, missing_rows=1)
    open_trace(path).validate()
    rewrite(path, lambda f: f, missing_rows=2)
    with pytest.raises(TraceError, match=r"1 \(token, layer\) rows are missing; .* says 2"):
        open_trace(path).validate()


def test_a_truncated_file_is_told(path: Path) -> None:
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 8):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"t\.parquet: truncated"):
            open_trace(path)
    path.write_bytes(whole[: len(whole) // 2] + whole[-4:])  # ends as it should, is damaged
    with pytest.raises(TraceError, match=r"t\.parquet"):
        open_trace(path).validate()


def test_what_is_no_trace_is_told(path: Path) -> None:
    with pytest.raises(TraceError, match="there is no such trace"):
        open_trace(path.with_name("other.parquet"))
    with pytest.raises(TraceError, match="is a folder"):
        open_trace(path.parent)
    frame = pl.read_parquet(path)
    frame.write_parquet(path)
    with pytest.raises(TraceError, match="not a routing trace"):
        open_trace(path)
    path.write_text("turn,phase\n0,0\n")
    with pytest.raises(TraceError, match="not a Parquet file"):
        open_trace(path)
    path.write_bytes(b"")
    with pytest.raises(TraceError, match="not a Parquet file"):
        open_trace(path)


def test_missing_and_wrong_columns_are_named(path: Path) -> None:
    rewrite(path, lambda f: f.with_columns(pl.col("layer").cast(pl.Int64)))
    with pytest.raises(TraceError, match="column layer is Int64, not UInt16"):
        open_trace(path)
    rewrite(path, lambda f: f.drop("layer"))
    with pytest.raises(TraceError, match="no column layer"):
        open_trace(path)


def test_a_promised_prediction_must_be_there(path: Path) -> None:
    rewrite(path, lambda f: f.drop("predicted_logits_1"))
    with pytest.raises(TraceError, match="no column predicted_logits_1, which the metadata"):
        open_trace(path)


def test_an_optional_column_is_required_by_name(path: Path) -> None:
    rewrite(path, lambda f: f.drop("token_id", "weights"))
    trace = open_trace(path)
    trace.validate()
    assert not trace.has("weights")
    with pytest.raises(TraceError, match=r"t\.parquet: no column weights, which policy x needs"):
        trace.require("weights", "policy x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": 0}, "format version 0: there is none, a version is 1 to"),
        ({"format_version": True}, "format version True: there is none"),
        ({"format_version": "1"}, "format version '1': there is none"),
        ({"n_layers": "3"}, "n_layers cannot be '3'"),
        ({"n_layers": True}, "n_layers cannot be True"),
        ({"top_k": 5}, "top_k is 5"),
        ({"source": "dreamt"}, "source is 'dreamt'"),
        ({"expert_bytes": {"fp16": "big"}}, "expert_bytes cannot be"),
        ({"expert_bytes": {"fp16": 0}}, "not positive"),
    ],
)
def test_bad_metadata_is_told(path: Path, change: dict[str, Any], message: str) -> None:
    rewrite(path, lambda f: f, **change)
    with pytest.raises(TraceError) as caught:
        open_trace(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_metadata_of_a_later_minor_writer_is_read() -> None:
    text = json.dumps(json.loads(make_meta().to_json()) | {"a_new_field": 1})
    assert TraceMeta.from_json(text) == make_meta()
    with pytest.raises(TraceError, match=r"incomplete: .*model"):
        TraceMeta.from_json('{"format_version": 1, "source": "recorded"}')


def bad_rows() -> list[tuple[Rows, str]]:
    rows = make_rows(make_meta(horizon=1))
    backwards = replace(rows, position=rows.position[::-1].copy())
    return [
        (replace(rows, experts=rows.experts[:, :1]), "column experts is uint16[30, 1]"),
        (replace(rows, layer=rows.layer.astype(np.int64)), "column layer is int64[30], not uint16"),
        (replace(rows, predicted=()), "0 prediction columns; the metadata's horizon is 1"),
        (backwards, "column sequence, position, layer"),
        (rows.slice(1, 30), "rows are missing before (sequence 0, position 0, layer 1)"),
        (replace(rows, phase=rows.phase + np.uint8(1)), "row 6, column phase: 2 is no phase"),
    ]


@pytest.mark.parametrize(("rows", "message"), bad_rows())
def test_the_writer_refuses_bad_rows(tmp_path: Path, rows: Rows, message: str) -> None:
    meta = make_meta(horizon=1)
    with pytest.raises(TraceError) as caught:
        write(tmp_path / "t", meta, rows)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_order_holds_across_writes(tmp_path: Path) -> None:
    rows = make_rows(make_meta())
    with pytest.raises(TraceError, match=r"row 15, .*does not come after"):
        write(tmp_path / "t", make_meta(), rows.slice(0, 15), rows.slice(12, 30))
    weightless = replace(rows.slice(15, 30), weights=None)
    with pytest.raises(TraceError, match="column weights is not in every batch"):
        write(tmp_path / "u", make_meta(), rows.slice(0, 15), weightless)


def test_an_unknown_name_lists_the_samples() -> None:
    with pytest.raises(TraceError) as caught:
        open_trace("mixtral-lik")
    assert "did you mean 'mixtral-like'?" in str(caught.value)
    assert all(name in str(caught.value) for name in sample_names())


def test_importing_the_package_loads_no_polars() -> None:
    code = "import sys, moeroute; sys.exit('polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        pl.DataFrame.reverse,
        lambda frame: frame.with_columns(pl.col("position").shuffle(1)),
        lambda frame: pl.concat([frame, frame]),
        lambda frame: frame.sample(fraction=0.5, seed=1),
    ],
)
def test_who_replays_or_counts_a_trace_whose_rows_are_out_of_order_refuses_it(
    path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]
) -> None:
    rewrite(path, change)
    for reader in (read_routing, load_workload):
        with pytest.raises(TraceError, match=r"t\.parquet: row \d+, column sequence, position"):
            reader(open_trace(path))


def test_a_trace_that_lacks_rows_without_saying_so_is_not_replayed(path: Path) -> None:
    rewrite(path, lambda frame: frame.filter(pl.int_range(pl.len()) != 3))
    with pytest.raises(TraceError, match="rows are missing before"):
        load_workload(open_trace(path))
