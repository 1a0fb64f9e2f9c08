"""Rows to polars frames and back: only this module knows how the schema is stored in Parquet.

polars is imported inside functions: importing the package must not load polars.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import Source
from moeroute.naming import Place, naming_errors
from moeroute.schema import PHASES, PREDICTED, Rows, TraceError, TraceMeta, column_spec

if TYPE_CHECKING:
    import polars as pl

MAGIC = b"PAR1"


def is_url(path: Place) -> bool:
    """Whether ``path`` is a URL: s3://, gs://, hf://, https:// and the others that polars knows."""
    return isinstance(path, str) and "://" in path


def column_type(name: str, meta: TraceMeta) -> pl.DataType:
    """The polars type of column `name` in a trace of `meta`."""
    import polars as pl

    if name == "phase":
        return pl.Enum(PHASES)
    spec = column_spec(name)
    assert spec is not None
    item = getattr(pl, {"u": "UInt", "f": "Float"}[spec.dtype.kind] + str(spec.dtype.itemsize * 8))
    width = meta.width(name)
    return pl.Array(item, width) if width else item()


def frame_from_rows(rows: Rows, meta: TraceMeta) -> pl.DataFrame:
    """A frame of checked rows; an all-NaN prediction becomes null."""
    import polars as pl

    series = []
    for name, column in rows.columns().items():
        dtype = column_type(name, meta)
        if name == "phase":
            names = pl.Series(name, PHASES, dtype=dtype)
            series.append(names.gather(column))
        else:
            series.append(pl.Series(name, np.ascontiguousarray(column), dtype=dtype))
    frame = pl.DataFrame(series)
    gone = {
        name: np.isnan(column).all(axis=1)
        for name, column in rows.columns().items()
        if name.startswith(PREDICTED)
    }
    return frame.with_columns(
        pl.when(pl.Series(absent)).then(None).otherwise(pl.col(name)).alias(name)
        for name, absent in gone.items()
    )


def array_from_series(series: pl.Series, where: str, first_row: int = 0) -> NDArray[Any]:
    """The NumPy array of one column, without a copy where polars can; may be read-only.

    Null predictions become NaN rows. Raises TraceError on any other null.
    """
    spec = column_spec(series.name)
    if spec is None:
        raise TraceError(f"{where}: column {series.name!r} is none of a trace's")
    predicted = series.name.startswith(PREDICTED)
    if series.null_count() and not predicted:
        row = first_row + int(series.is_null().arg_max() or 0)
        raise TraceError(f"{where}: row {row}, column {series.name}: there is no value")
    if series.name == "phase":
        series = series.to_physical()
    array = series.to_numpy()
    if array.dtype != spec.dtype:  # nulls inside a list make polars widen
        raise TraceError(f"{where}: column {series.name}: a list has a hole")
    return array


def part_of(frame: pl.DataFrame) -> memoryview:
    """The bytes of `frame` as uncompressed Arrow IPC, the cheapest format for a recorder."""
    data = io.BytesIO()
    frame.write_ipc(data, compression="uncompressed")
    return data.getbuffer()


def write_part(part: memoryview, path: Path) -> None:
    """Write the bytes of a part to `path`."""
    with naming_errors(path):
        path.write_bytes(part)


def read_part(path: Path, crc32: int | None) -> dict[str, NDArray[Any]]:
    """The columns of a part. Raises TraceError if the file is damaged.

    `crc32` None: nobody knows its checksum. polars then takes changed values for right ones, and
    prints lines of its own where offsets in the file are wrong.
    """
    import polars as pl

    with naming_errors(path):
        part = path.read_bytes()
        if crc32 is not None and zlib.crc32(part) != crc32:
            raise TraceError(
                f"{path}: is damaged (its checksum differs): remove {path.parent} to start over"
            )
        frame = pl.read_ipc(part)
    return {series.name: array_from_series(series, str(path)) for series in frame}


def join_parts(parts: list[Path], path: Path, metadata: dict[str, str]) -> None:
    """Stream part files into one Parquet file, and flush that file to the disk."""
    import polars as pl

    with naming_errors(path):
        pl.scan_ipc(parts, glob=False).sink_parquet(
            path,
            compression="zstd",
            compression_level=3,
            statistics=False,
            row_group_size=1 << 16,
            metadata=metadata,
            sync_on_close="all",
            engine="streaming",
        )


def scan(place: Place) -> pl.LazyFrame:
    """A lazy frame over one trace. Raises TraceError if the file is not a whole Parquet file."""
    import polars as pl

    if isinstance(place, Path):
        check_whole(place)
    with naming_errors(place):
        frame = pl.scan_parquet(place, glob=False)
        frame.collect_schema()
    return frame


def check_whole(path: Path) -> None:
    """Raise TraceError unless `path` begins and ends as a Parquet file does."""
    if not path.exists():
        partial = partial_folder(path)
        hint = f"; {partial} is an unfinished one, resume it" if partial.is_dir() else ""
        raise TraceError(f"{path}: there is no such trace{hint}")
    source = Source(path, "trace")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
        size = file.seek(0, 2)
        file.seek(max(0, size - len(MAGIC)))
        end = file.read()
    if start != MAGIC:
        raise TraceError(
            f"{path}: not a routing trace (not a Parquet file, but {source.described}); recordings "
            f"of other programs become traces by: moetrace import {path} --out TRACE.parquet"
        )
    if end != MAGIC or size < 12:
        raise TraceError(f"{path}: truncated: the file ends in the middle ({size} bytes)")


def partial_folder(path: Path) -> Path:
    """The folder of the unfinished trace that will become `path`."""
    return Path(f"{path}.partial")  # with_name would refuse "." and "/"
