"""Traces in an object store: the same trace wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from moeroute import TraceError, open_trace
from support.object_store import ObjectStore, store_for_this_process
from support.traces import random_trace


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with store_for_this_process() as store:
        yield store


def test_a_trace_is_the_same_in_a_store(store: ObjectStore, tmp_path: Path) -> None:
    file = random_trace(tmp_path / "t.parquet")
    store.objects["/traces/deep/t.parquet"] = file.read_bytes()
    here, there = open_trace(file), open_trace("s3://traces/deep/t.parquet")
    assert there.meta == here.meta
    assert there.n_rows == here.n_rows
    assert there.columns == here.columns
    for name in here.columns:
        np.testing.assert_array_equal(there.array(name), here.array(name))
    there.validate()
    assert "s3://traces/deep/t.parquet" in there.describe()


def test_the_digest_of_a_trace_in_a_store_is_of_what_it_holds(
    store: ObjectStore, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = random_trace(tmp_path / f"{name}.parquet", seed=seed)
        store.objects[f"/traces/{name}.parquet"] = file.read_bytes()
    a, b, c = (open_trace(f"s3://traces/{name}.parquet").digest for name in "abc")
    assert a == b
    assert a != c
    assert len(a) == 64


def test_what_is_not_there_or_no_trace_is_named(store: ObjectStore) -> None:
    with pytest.raises(TraceError, match=r"s3://traces/absent.parquet: there is no such trace"):
        open_trace("s3://traces/absent.parquet")
    store.objects["/traces/text.parquet"] = b"hello, this is no Parquet file at all"
    with pytest.raises(TraceError, match=r"s3://traces/text.parquet: cannot be read"):
        open_trace("s3://traces/text.parquet")


def test_only_the_columns_asked_for_are_fetched(store: ObjectStore, tmp_path: Path) -> None:
    file = random_trace(tmp_path / "t.parquet", n_tokens=20_000)
    store.objects["/traces/large.parquet"] = file.read_bytes()
    trace = open_trace("s3://traces/large.parquet")
    before = len(store.fetched)
    trace.array("layer")
    assert sum(store.fetched[before:]) < file.stat().st_size / 4
