"""Lazy reading of traces: only the columns asked for, as NumPy arrays."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeroute.check import OrderChecker, RowChecker, check_names
from moeroute.naming import Place, meant, naming_errors, sha256_of
from moeroute.parquet import MAGIC, array_from_series, column_type, is_url, scan
from moeroute.schema import (
    META_KEY,
    NO_EXPERT,
    Rows,
    TraceError,
    TraceMeta,
    TraceUsageError,
    column_names,
    column_spec,
    rows_from_columns,
)

if TYPE_CHECKING:
    import polars as pl

SAMPLES = Path(__file__).parent / "samples"
_BATCH_ROWS = 1 << 18


def sample_names() -> list[str]:
    """The names of the traces that ship with the package."""
    return sorted(path.stem for path in SAMPLES.glob("*.parquet"))


def find_trace(path_or_name: str | Path) -> Place:
    """The file of a path or of a sample's name; a URL is returned unchanged.

    A bare sample name means the sample; write ./tiny for a file of that name. Raises
    TraceUsageError that lists the samples.
    """
    if is_url(path_or_name):
        return path_or_name
    text = str(path_or_name)
    names = sample_names()
    if text in names:
        return SAMPLES / f"{text}.parquet"
    path = Path(path_or_name)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    raise TraceUsageError(
        f"no trace {text!r}: {meant(text, names)}there is no such file, and the samples are: "
        f"{', '.join(names) or 'none'}"
    )


def find_existing(path_or_name: str | Path) -> Place:
    """As `find_trace`. Raises TraceError where it leads to no file, and for a local Parquet file
    that is no trace of this program's versions; reads no more than its metadata."""
    place = find_trace(path_or_name)
    if not isinstance(place, Path):
        return place
    if not place.is_file():
        is_folder = place.is_dir()
        raise TraceError(
            f"{place}: {'is a folder, not a' if is_folder else 'there is no such'} trace"
        )
    with place.open("rb") as file:
        is_parquet = file.read(len(MAGIC)) == MAGIC
    if is_parquet:
        Trace(place)
    return place


def open_trace(path_or_name: str | Path) -> Trace:
    """Open a trace by its file, its URL or a sample's name; reads the metadata only.

    polars reads URLs (s3://, gs://, hf:// and others), with the endpoints and credentials of the
    environment. Raises TraceError for a file that is missing, truncated, not a trace, or without a
    required column.
    """
    return Trace(find_trace(path_or_name))


class Trace:
    """One trace. Columns are read when asked for and not kept."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self._frame = scan(path)
        self.meta = _read_meta(path)
        self.columns = self._check_columns()

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {self.title}, {self.n_rows} rows)"

    def _repr_html_(self) -> str:
        meta = self.meta
        about = {
            "model": self.title,
            "tokens": f"{self.n_rows // meta.n_layers:,}",
            "layers": meta.n_layers,
            "experts": f"{'up to ' if meta.variable_top_k else ''}top-{meta.top_k} of "
            f"{meta.n_experts}",
            "predictions": f"{meta.prediction}, {meta.horizon} layers ahead"
            if meta.prediction
            else "none",
            "columns": ", ".join(self.columns),
        }
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in about.items()
        )
        return f"<table>{rows}</table>"

    def frame(self) -> pl.LazyFrame:
        """The trace as a lazy polars frame, a row a (token, layer)."""
        return self._frame

    @cached_property
    def n_rows(self) -> int:
        """Rows: (token, layer) pairs."""
        import polars as pl

        with naming_errors(self.path):
            return int(self._frame.select(pl.len()).collect().item())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, as sha256sum prints it; of a trace at a URL, of metadata and
        columns."""
        if not isinstance(self.path, Path):
            return self._digest_contents()
        return sha256_of(self.path).hex()

    @property
    def title(self) -> str:
        """The model and, unless the trace was recorded from that model, where the trace is from."""
        source = self.meta.source
        return self.meta.model + ("" if source == "recorded" else f" ({source})")

    def describe(self, *, notes: bool = True) -> str:
        """A few lines for people: the model, the size, and what the trace can be used for.

        `notes`: with the notes of the trace's maker.
        """
        from moeroute.sizes import sizes_line

        meta = self.meta
        tokens = (self.n_rows + meta.missing_rows) // meta.n_layers
        lines = [
            f"{self.title}: {tokens} tokens x {meta.n_layers} layers, "
            f"{'up to ' if meta.variable_top_k else ''}top-{meta.top_k} of "
            f"{meta.n_experts} experts",
            f"file: {self.path} (sha256 {self.digest[:12]})",
            f"columns: {', '.join(self.columns)}",
        ]
        if meta.source == "synthetic":
            lines.insert(1, f"synthetic: generated from seed {meta.seed}, not recorded")
        if self.has("pass_id"):
            lines.append("forward passes are recorded: tokens of one pass are one step a layer")
        if meta.missing_rows:
            lines.append(f"{meta.missing_rows} (token, layer) rows the recorder lost or skipped")
        if meta.prediction:
            lines.append(f"predictions: {meta.prediction}, up to {meta.horizon} layers ahead")
        lines.append(sizes_line(meta))
        if notes:
            lines += [f"{name}: {note}" for name, note in meta.notes.items()]
        return "\n".join(lines)

    def has(self, column: str) -> bool:
        """Whether the trace has `column`."""
        return column in self.columns

    def require(self, column: str, needed_by: str) -> None:
        """Raise TraceError naming `column`, the file and `needed_by` if the trace lacks it."""
        if not self.has(column):
            raise TraceError(
                f"{self.path}: no column {column}, which {needed_by} needs; "
                f"the trace has {', '.join(self.columns)}"
            )

    def array(self, name: str) -> NDArray[Any]:
        """One column: [n] or, for list columns, [n, K] or [n, E]; may be read-only.

        `phase` is 0 for prompt, 1 for decode; a row without a prediction is NaN.
        """
        return self.arrays(name)[name]

    def arrays(
        self, *names: str, start: int = 0, stop: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Several columns in one read, of rows start..stop-1 (default: all)."""
        for name in names:
            self.require(name, "the caller")
        length = None if stop is None else max(0, stop - start)
        with naming_errors(self.path):
            frame = self._frame.select(names).slice(start, length).collect()
        return {name: array_from_series(frame[name], str(self.path), start) for name in names}

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start..stop-1 (default: all) with every column the trace has."""
        return rows_from_columns(self.arrays(*self.columns, start=start, stop=stop))

    def batches(self, n_rows: int = _BATCH_ROWS) -> Iterator[Rows]:
        """All rows, `n_rows` at a time."""
        for start in range(0, self.n_rows, n_rows):
            yield self.rows(start, start + n_rows)

    def expert_counts(self) -> NDArray[np.int64]:
        """How often each expert is used, prompts included: int64[n_layers, n_experts]."""
        n_layers, n_experts = self.meta.n_layers, self.meta.n_experts
        variable = self.meta.variable_top_k
        counts = np.zeros(n_layers * n_experts, np.int64)
        for start in range(0, self.n_rows, _BATCH_ROWS):
            columns = self.arrays("layer", "experts", start=start, stop=start + _BATCH_ROWS)
            keys = columns["layer"].astype(np.int64)[:, None] * n_experts + columns["experts"]
            chosen = keys[columns["experts"] != NO_EXPERT] if variable else keys.ravel()
            counts += np.bincount(chosen, minlength=len(counts))
        return counts.reshape(n_layers, n_experts)

    def validate(self) -> None:
        """Read everything. Raises TraceError that names the row and column of the first fault."""
        check = RowChecker(self.meta, str(self.path))
        for rows in self.batches():
            check.add(rows)
        check.finish()
        if not self.n_rows:
            raise TraceError(f"{self.path}: has no rows")

    def check_order(self) -> None:
        """Read where each row belongs. Raises TraceError that names the first row out of order, or
        before which rows are missing; other readers give wrong answers to such a file."""
        check = OrderChecker(self.meta, str(self.path))
        for start in range(0, self.n_rows, _BATCH_ROWS):
            of = self.arrays("sequence", "position", "layer", start=start, stop=start + _BATCH_ROWS)
            check.add(of["sequence"], of["position"], of["layer"])
        check.finish()

    def _digest_contents(self) -> str:
        """SHA-256 of the metadata and every column: polars does not hand out a file's bytes."""
        columns = {name: hashlib.sha256() for name in self.columns}
        for rows in self.batches():
            for name, column in rows.columns().items():
                columns[name].update(column.tobytes())
        parts = [self.meta.to_json(), *(f"{name} {d.hexdigest()}" for name, d in columns.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _check_columns(self) -> tuple[str, ...]:
        """The trace's columns in the schema's order; unknown ones are left alone."""
        schema = self._frame.collect_schema()
        check_names(schema.names(), str(self.path))
        for name, found in schema.items():
            if column_spec(name) is not None and found != column_type(name, self.meta):
                raise TraceError(
                    f"{self.path}: column {name} is {found}, not {column_type(name, self.meta)}"
                )
        for name in column_names(self.meta.horizon):
            if name.startswith("predicted") and name not in schema:
                raise TraceError(f"{self.path}: no column {name}, which the metadata promises")
        return tuple(name for name in column_names(self.meta.horizon) if name in schema)


def is_trace(path: Place) -> bool:
    """Whether a Parquet file is a trace of this project. Raises TraceError for an unreadable
    file."""
    import polars as pl

    scan(path)
    with naming_errors(path):
        return META_KEY in pl.read_parquet_metadata(path)


def _read_meta(path: Place) -> TraceMeta:
    import polars as pl

    with naming_errors(path):
        found = pl.read_parquet_metadata(path).get(META_KEY)
    if found is None:
        raise TraceError(f"{path}: not a routing trace (a Parquet file of another program)")
    try:
        return TraceMeta.from_json(found)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
