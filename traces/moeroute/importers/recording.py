"""From a recording in its file's order to a trace: the steps that all importers share.

An importer reads its file into a Recording; `write_recording` sorts it, drops what is there twice,
puts experts into descending order of weight, counts what is incomplete, and notes all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeroute.importers.findings import Findings
from moeroute.schema import PROMPT, TraceError, TraceMeta, column_spec, rows_from_columns
from moeroute.sizes import unknown_sizes
from moeroute.trace import Trace, open_trace
from moeroute.writer import TraceWriter

_BATCH_ROWS = 1 << 18
_BY_SLOT = ("experts", "weights", "residency", "loaded_bytes")  # [n, K]
_SUM_TOLERANCE = 0.01  # float16 weights
_RESIDENCY_CODES = 3
_TELLING_ROWS = 32  # in fewer, an expert may be in every row by chance

Columns = dict[str, NDArray[Any]]


@dataclass
class Recording:
    """What an importer read: one row a (sequence, position, layer), in the file's order.

    `columns` are named as in a trace, of any number type. `place` says where in the file row i
    stands ("line 12"); every message about a row begins with it. `meta` needs neither
    `missing_rows` nor `notes`: they are counted and filled in. The class is long because each kind
    of thing that an import may change, drop or not know has a check of its own here.
    """

    path: Path
    meta: TraceMeta
    columns: Columns
    place: Callable[[int], str]
    findings: Findings

    def write(self, out: str | Path) -> Trace:
        """Write the trace, leaving nothing at `out` if a row is wrong, and open it.

        Raises TraceError naming the file, the place in it, the column and the value.
        """
        columns = self._fitted()
        order = self._sorted(columns)
        rows = {name: column[order] for name, column in columns.items()}
        self._tell_phases(rows)
        self._tell_weights(rows)
        self._tell_positions(rows)
        self._tell_unknown(rows)
        meta = replace(
            self.meta,
            missing_rows=self._tell_incomplete(rows),
            notes={"imported_from": _origin(self.path)} | self.findings.as_notes(),
        )
        writer = TraceWriter(
            out, meta, rows_of=str(self.path), row_name=lambda i: self.place(int(order[i]))
        )
        try:
            for start in range(0, len(order), _BATCH_ROWS):
                cut = slice(start, start + _BATCH_ROWS)
                writer.write(rows_from_columns({name: rows[name][cut] for name in rows}))
            writer.close()
        except BaseException:
            writer.discard()
            raise
        return open_trace(Path(out))

    def _fitted(self) -> Columns:
        """The columns in a trace's number types; a value that does not fit is told by its place."""
        if not len(self.columns["sequence"]):
            raise TraceError(f"{self.path}: holds no routing: there is no row to import")
        fitted = {}
        for name, found in self.columns.items():
            spec = column_spec(name)
            assert spec is not None
            with np.errstate(invalid="ignore", over="ignore"):
                fitted[name] = found.astype(spec.dtype)
            if spec.dtype.kind == "u":
                self._refuse(name, found, fitted[name] != found)
        return fitted

    def _refuse(self, name: str, values: NDArray[Any], wrong: NDArray[np.bool_]) -> None:
        """Raise TraceError if a value is wrong, with its place."""
        if wrong.any():
            row = int(np.nonzero(wrong)[0][0])
            bad = values[wrong].flat[0]
            raise TraceError(
                f"{self.path}: {self.place(row)}, column {name}: {bad} is out of range"
            )

    def _sorted(self, columns: Columns) -> NDArray[np.intp]:
        """The rows in a trace's order, without those that are there twice."""
        key = np.stack([columns[name] for name in ("layer", "position", "sequence")])
        order = np.lexsort(key)
        moved = int((order != np.arange(len(order))).sum())
        self.findings.count(
            "order",
            moved,
            "rows stood elsewhere: sorted by sequence, position, layer",
            of=len(order),
        )
        sequence = columns["sequence"]
        heads = np.unique(sequence, return_index=True)[1]
        if (np.diff(heads) < 0).any():
            began = ", ".join(str(sequence[i]) for i in np.sort(heads)[:3])
            self.findings.note(
                "sequences", f"order changed: by number now, in the file {began}, ... come first"
            )
        again = np.flatnonzero((key[:, order[1:]] == key[:, order[:-1]]).all(axis=0)) + 1
        self._refuse_contradictions(columns, order, again)
        self.findings.count("duplicates", len(again), "rows that repeat another: dropped")
        return np.delete(order, again)

    def _refuse_contradictions(
        self, columns: Columns, order: NDArray[np.intp], again: NDArray[np.intp]
    ) -> None:
        now, before = order[again], order[again - 1]
        for name, column in columns.items():
            wide = column.reshape(len(column), -1)
            same = (wide[now] == wide[before]) | (
                (wide[now] != wide[now]) & (wide[before] != wide[before])
            )
            for i in np.flatnonzero(~same.all(axis=1))[:1]:
                first, second = int(before[i]), int(now[i])
                where = {n: int(columns[n][first]) for n in ("sequence", "position", "layer")}
                raise TraceError(
                    f"{self.path}: {self.place(first)} and {self.place(second)} are both "
                    + ", ".join(f"{n} {value}" for n, value in where.items())
                    + f", but differ in {name}"
                )

    def _tell_phases(self, rows: Columns) -> None:
        prompt, sequence = rows["phase"] == PROMPT, rows["sequence"]
        if not prompt.any() and "phase" not in self.findings:
            self.findings.note("phase", "no prompt is recorded: every token is decode")
        elif prompt.all():
            self.findings.note("phase", "no decode step is recorded: every token is prompt")
        same = sequence[1:] == sequence[:-1]
        token = same & (rows["position"][1:] == rows["position"][:-1])
        split = token & (prompt[1:] != prompt[:-1])
        self.findings.count("phase", int(split.sum()), "tokens change phase between layers")
        resumed = np.unique(sequence[1:][same & ~token & prompt[1:] & ~prompt[:-1]])
        self.findings.count(
            "phase",
            len(resumed),
            "sequences have prompt tokens after decode (a second turn, or a prompt in parts)",
            of=len(np.unique(sequence)),
        )

    def _tell_weights(self, rows: Columns) -> None:
        """Put the experts of rows whose weights rise into descending order."""
        weights = rows.get("weights")
        if weights is None:
            return
        finite = np.isfinite(weights).all(axis=1)
        rising = np.flatnonzero(finite & (np.diff(weights, axis=1) > 0).any(axis=1))
        order = np.argsort(-weights[rising], axis=1, kind="stable")
        for name in rows.keys() & set(_BY_SLOT):
            rows[name][rising] = np.take_along_axis(rows[name][rising], order, axis=1)
        self.findings.count(
            "weights",
            len(rising),
            "rows had experts in another order: put in descending order of weight",
            of=len(weights),
        )
        off = finite & (np.abs(weights.sum(axis=1) - 1) > _SUM_TOLERANCE)
        self.findings.count(
            "weights",
            int(off.sum()),
            "rows do not sum to 1: kept as recorded, not renormalised",
            of=len(weights),
        )

    def _tell_positions(self, rows: Columns) -> None:
        sequence, position = rows["sequence"], rows["position"].astype(np.int64)
        same = sequence[1:] == sequence[:-1]
        gaps = same & (np.diff(position) > 1)
        holed = len(np.unique(sequence[1:][gaps]))
        begins = position[np.concatenate(([True], ~same))]
        if holed:
            self.findings.note(
                "positions",
                f"gaps between tokens: {gaps.sum()}, in {holed} of {len(begins)} sequences",
            )
        self.findings.count(
            "positions", int((begins > 0).sum()), "sequences do not begin at 0", of=len(begins)
        )

    def _tell_incomplete(self, rows: Columns) -> int:
        """Count the (token, layer) rows that are not there, and the layers that never are."""
        n_layers = self.meta.n_layers
        token = np.stack([rows["sequence"], rows["position"]])
        new = np.concatenate(([True], (np.diff(token.astype(np.int64)) != 0).any(axis=0)))
        layers = np.diff(np.append(np.flatnonzero(new), len(new)))
        missing = n_layers * len(layers) - len(new)
        self.findings.count(
            "incomplete",
            int((layers < n_layers).sum()),
            f"tokens lack layers: {missing} (token, layer) rows are missing",
            of=len(layers),
        )
        idle = sorted(set(range(n_layers)) - set(np.unique(rows["layer"]).tolist()))
        named = ", ".join(map(str, idle[:8])) + (", ..." if len(idle) > 8 else "")
        self.findings.count("layers", len(idle), f"layers never have a row: {named}", of=n_layers)
        return max(0, missing)

    def _tell_unknown(self, rows: Columns) -> None:
        meta, chosen = self.meta, np.bincount(rows["experts"].ravel())
        if meta.top_k < meta.n_experts and len(rows["layer"]) >= _TELLING_ROWS:
            for expert in np.flatnonzero(chosen == len(rows["layer"])):
                self.findings.note("experts", f"expert {expert} is in every row: a shared expert?")
        if (codes := rows.get("residency")) is not None:
            odd = codes >= _RESIDENCY_CODES
            named = ", ".join(map(str, np.unique(codes[odd])[:8]))
            self.findings.count("residency", int(odd.sum()), f"codes of unknown meaning: {named}")
        unknown = unknown_sizes(meta)
        if unknown:
            self.findings.note("sizes", f"unknown: {', '.join(unknown)} (--like gives them)")
        optional = {
            "weights": "weights",
            "token_id": "token ids",
            "router_logits": "router logits",
            "predicted_logits_1": "predictions of later gates",
        }
        absent = [words for name, words in optional.items() if name not in rows]
        if absent:
            self.findings.note("absent", ", ".join(absent))


def fit(path: Path, name: str, value: ArrayLike, least: int, most: int) -> int:
    """A whole number of the file. Raises TraceError naming file and field if it is out of range."""
    number = int(np.asarray(value))
    if not least <= number <= most:
        raise TraceError(f"{path}: {name} is {number}, not {least}..{most}")
    return number


def _origin(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
