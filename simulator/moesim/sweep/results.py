"""The result of a sweep: tidy Parquet, one row a point, with everything that produced the row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepolicy.counts import always_there
from moepolicy.counts import columns as row_columns
from moepolicy.outputs import check_suffix, written_whole
from moepolicy.tables import to_json
from moeroute.jsontext import parse_json
from moeroute.parquet import is_url

from moesim.errors import SimulationError
from moesim.gap import Gap
from moesim.result import Result
from moesim.sweep.plan import SweepPlan
from moesim.sweep.worker import versions

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".parquet", ".csv", ".json")
METADATA = "moesim-sweep"  # of the Parquet file's key-value metadata: the grid

# What a row is of and what it was made with; the columns of `Result` follow.
LABELS: dict[str, type] = {
    "key": str,
    "status": str,
    "error": str,
    "policy": str,
    "policy_name": str,
    "parameters": str,
    "policy_sha256": str,
    "needs_future": bool,
    "slots": int,
    "memory_bytes": int,
    "scope": str,
    "machine": str,
    "machine_source": str,
    "machine_sha256": str,
    "precision": str,
    "expert_bytes": int,
    "trace_path": str,
    "trace_sha256": str,
    "trace_seed": int,
    "calibration_sha256": str,
    "engine": str,
    **dict.fromkeys(versions(), str),
}


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """The rows as a frame, with the same columns and types whatever values the rows have."""
    import polars as pl

    return pl.DataFrame(rows, schema=_schema(), orient="row", strict=True)


def _schema() -> dict[str, pl.DataType]:
    import polars as pl

    kinds = {str: pl.String(), int: pl.Int64(), float: pl.Float64(), bool: pl.Boolean()}
    return {name: kinds[kind] for name, kind in columns().items()}


def columns() -> dict[str, type]:
    """Name and type of every column. A column whose values may be missing has the type of its
    values."""
    found = LABELS | {n: kind for n, kind in row_columns(Result).items() if n not in LABELS}
    return found | dict.fromkeys(Gap("", None, None).row(), float)


def is_row(row: dict[str, Any]) -> bool:
    """Whether a finished point that was read back has what `table` needs of a point."""
    kinds, needed = columns(), {*row_columns(Result), *versions(), "engine"}
    return (
        needed <= row.keys()
        and all(row[name] is not None for name in always_there(Result))
        and all(_is_of(value, kinds.get(name, object)) for name, value in row.items())
    )


def _is_of(value: Any, kind: type) -> bool:
    if value is None:
        return True
    if kind is int:
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 63
    return isinstance(value, (int, float) if kind is float else kind)


def suffix_of(out: str) -> str:
    """The suffix that gives the format of ``out``. Raises CommandUsageError for an unknown suffix.

    A URL takes Parquet alone: no other format can be read back from there.
    """
    return check_suffix(out, SUFFIXES[:1] if is_url(out) else SUFFIXES)


def write(frame: pl.DataFrame, plan: SweepPlan, out: str) -> None:
    """Write ``out`` whole or not at all. Raises SimulationError that names ``out``."""
    suffix, metadata = suffix_of(out), {METADATA: json.dumps(asdict(plan.grid))}
    with _naming(out):
        if is_url(out):
            frame.write_parquet(out, metadata=metadata)
            return
        with written_whole(Path(out)) as partial:
            whole = io.BytesIO()  # polars' own errors on a full disk do not name what fails
            if suffix == ".parquet":
                frame.write_parquet(whole, metadata=metadata)
            elif suffix == ".csv":
                frame.write_csv(whole)
            else:
                whole.write(to_json(frame.to_dicts()).encode())
            partial.write_bytes(whole.getbuffer())


def read_finished(out: str) -> dict[str, dict[str, Any]]:
    """The points that an earlier sweep wrote to ``out``, by key; none if the file does not exist.

    Raises SimulationError where ``out`` cannot be read or is not the result of a sweep.
    """
    import polars as pl

    with _naming(out):
        try:
            frame = _read(out)
        except FileNotFoundError:
            return {}
    if not {"key", "status"} <= set(frame.columns):
        raise SimulationError(f"{out} is not the result of a sweep: it has no column key")
    done = frame.filter(pl.col("status") == "ok")
    return {row["key"]: row for row in done.iter_rows(named=True)}


def _read(out: str) -> pl.DataFrame:
    """A result as it was written, types included. Raises FileNotFoundError and polars' errors."""
    import polars as pl

    suffix = suffix_of(out)
    if suffix == ".parquet":
        return pl.read_parquet(out, glob=False)
    if suffix == ".csv":
        return pl.read_csv(out, schema_overrides=_schema(), glob=False)
    try:
        return table(parse_json(Path(out).read_bytes()))
    except (ValueError, TypeError, AttributeError, OverflowError):  # a number of 50 digits
        return pl.DataFrame()


@contextmanager
def _naming(out: str) -> Iterator[None]:
    """Failures to read or write are told as ones of ``out``."""
    from polars.exceptions import PolarsError

    try:
        yield
    except (PolarsError, OSError) as error:
        told = getattr(error, "strerror", None) or str(error)
        reason = told.splitlines()[0] if told else type(error).__name__
        raise SimulationError(f"{out}: cannot be read or written ({reason})") from error
