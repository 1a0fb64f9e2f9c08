"""Parquet files with a row a (token, layer), as moe-policylang and others write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import moeroute.importers.fields as of
from moeroute.foreign import PARQUET, Source
from moeroute.importers.findings import Findings
from moeroute.importers.recording import (
    CHUNK_ROWS,
    PLACE,
    Columns,
    Facts,
    ImportOptions,
    Recording,
)
from moeroute.naming import naming_errors
from moeroute.schema import TraceError

if TYPE_CHECKING:
    import polars as pl

NAME = "parquet"


def detect(source: Source) -> bool:
    """Whether the file is Parquet with columns for layers and experts."""
    if source.kind != PARQUET or source.is_packed:
        return False
    return set(of.REQUIRED_FIELDS) <= of.choose(_frame(source).collect_schema().names(), {}).keys()


def read(source: Source, options: ImportOptions) -> Recording:
    """Read a Parquet file's rows. Raises TraceError naming the column that is missing or wrong."""
    of.check_map(options.fields)
    frame = _frame(source)
    there = frame.collect_schema().names()
    fields = of.choose(there, options.fields)
    findings = Findings()
    for column in of.REQUIRED_FIELDS:
        if column not in fields:
            raise TraceError(
                f"{source.path}: no column for {column} among {', '.join(there)}: name it with "
                f"--map {column}=COLUMN"
            )
    used = {path.split(".")[0] for path in fields.values()}
    if others := [name for name in there if name not in used]:
        findings.note("not_imported", "columns " + ", ".join(others))
    facts = Facts(source.path.name.split(".parquet")[0])
    chunks = _chunks(source, frame, fields)
    return Recording(source.path, facts, chunks, "row {}".format, findings)


def _frame(source: Source) -> pl.LazyFrame:
    from moeroute.parquet import scan

    return scan(source.path)


def _chunks(source: Source, frame: pl.LazyFrame, fields: dict[str, str]) -> Iterator[Columns]:
    import polars as pl

    names: dict[str, int] = {}
    wanted = [_at(path).alias(name) for name, path in fields.items()]
    with naming_errors(source.path):
        n = int(frame.select(pl.len()).collect().item())
    for start in range(0, n, CHUNK_ROWS):
        with naming_errors(source.path):
            found = frame.slice(start, CHUNK_ROWS).select(wanted).collect()
        columns = {s.name: _column(source, s, start, names) for s in found}
        yield columns | {PLACE: np.arange(start, start + len(found))}


def _at(path: str) -> pl.Expr:
    import polars as pl

    first, *rest = path.split(".")
    found = pl.col(first)
    for step in rest:
        found = found.struct.field(step)
    return found


def _column(source: Source, series: pl.Series, start: int, names: dict[str, int]) -> NDArray[Any]:
    """`names`: sequences that have names instead of numbers, in the order of the file."""
    import polars as pl

    def where(i: int) -> str:
        return f"{source.path}: row {start + i}"

    if series.null_count():
        at = int(series.is_null().arg_max() or 0)
        raise TraceError(f"{where(at)}, column {series.name}: there is no value")
    if series.name in of.LISTS:
        kind = series.dtype
        if isinstance(kind, pl.Array):
            series = series.arr.to_list()
        inner = getattr(series.dtype, "inner", None)
        whole = series.name == "experts"
        if inner is None or not (inner.is_integer() or (inner.is_float() and not whole)):
            raise TraceError(
                f"{source.path}: column {series.name} is {kind}, not a list of "
                f"{'whole ' if whole else ''}numbers"
            )
        flat = series.explode(empty_as_null=False).to_numpy()
        return of.padded(flat, series.list.len().to_numpy().astype(np.int64), -1 if whole else 0)
    if series.name == "phase":
        return of.phases(series.to_list(), where)
    if series.name == "sequence" and series.dtype == pl.String:
        return np.array([names.setdefault(name, len(names)) for name in series])
    if not series.dtype.is_integer():
        raise TraceError(
            f"{source.path}: column {series.name} is {series.dtype}, not whole numbers"
        )
    return series.to_numpy()
