"""The checks of a trace's rows, a batch at a time. An error names the row and the column."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeroute.schema import (
    NO_EXPERT,
    PHASES,
    PREDICTED,
    REQUIRED,
    Rows,
    TraceError,
    TraceMeta,
    column_spec,
)


class RowChecker:
    """Checks batches of rows that follow one another; the order is checked across batches too.

    Every message starts with `where`: the file, or another name for the rows. `row_name` gives the
    place of row i there: an importer's rows come from other places of its file.
    """

    def __init__(
        self,
        meta: TraceMeta,
        where: str,
        row_name: Callable[[int], str] = "row {}".format,
        *,
        counts_missing: bool = False,
    ) -> None:
        """``counts_missing``: any number of rows may be missing, whatever the metadata says."""
        self.meta = meta
        self.where = where
        self._row_name = row_name
        self.n_rows = 0
        self._order = OrderChecker(meta, where, row_name, counts_missing=counts_missing)
        self._last_pass = 0
        self._names: tuple[str, ...] | None = None

    def add(self, rows: Rows) -> None:
        """Check one more batch. Raises TraceError naming the first wrong row of a column."""
        columns = rows.columns()
        self._check_columns(columns)
        if not len(rows):
            return
        self._check_scalars(rows)
        self._check_experts(rows.experts)
        if rows.weights is not None:
            self._check_weights(rows.weights)
            if self.meta.variable_top_k:
                heavy = (rows.weights != 0) & (rows.experts == NO_EXPERT)
                self._fail_any(heavy.any(axis=1), "weights", lambda _: "a weight has no expert")
        for name in columns:
            if name == "router_logits" or name.startswith(PREDICTED):
                self._check_logits(name, columns[name])
        if (norm := rows.input_norm) is not None:
            self._fail_any(~np.isfinite(norm), "input_norm", lambda i: f"{norm[i]} is not finite")
        self._check_pass(rows)
        self._order.add(rows.sequence, rows.position, rows.layer)
        self.n_rows += len(rows)

    @property
    def missing_rows(self) -> int:
        """Rows of layers that a token lacks, so far."""
        return self._order.missing_rows

    def finish(self) -> int:
        """Compare the number of missing rows, which is returned, with the metadata's, once all
        batches are in. Raises TraceError."""
        return self._order.finish()

    def _check_columns(self, columns: dict[str, NDArray[Any]]) -> None:
        n = len(columns["sequence"])
        for name, column in columns.items():
            spec = column_spec(name)
            assert spec is not None  # Rows has no others
            width = self.meta.width(name)
            shape = (n, width) if width else (n,)
            if column.shape != shape or column.dtype != spec.dtype:
                raise TraceError(
                    f"{self.where}: column {name} is {column.dtype}{list(column.shape)}, "
                    f"not {spec.dtype}{list(shape)}"
                )
        predicted = sum(name.startswith(PREDICTED) for name in columns)
        if predicted != self.meta.horizon:
            raise TraceError(
                f"{self.where}: {predicted} prediction columns; the metadata's horizon is "
                f"{self.meta.horizon}"
            )
        if self._names is not None and self._names != tuple(columns):
            odd = sorted(set(self._names) ^ set(columns))
            raise TraceError(f"{self.where}: column {odd[0]} is not in every batch of rows")
        self._names = tuple(columns)

    def _check_scalars(self, rows: Rows) -> None:
        self._fail_any(rows.phase >= len(PHASES), "phase", lambda i: f"{rows.phase[i]} is no phase")
        self._fail_any(
            rows.layer >= self.meta.n_layers,
            "layer",
            lambda i: f"layer {rows.layer[i]} is out of range (there are {self.meta.n_layers})",
        )

    def _check_experts(self, experts: NDArray[np.uint16]) -> None:
        bad = experts >= self.meta.n_experts
        if self.meta.variable_top_k:
            none = experts == NO_EXPERT
            bad &= ~none
            hole = none[:, 0] | (none[:, :-1] & ~none[:, 1:]).any(axis=1)
            self._fail_any(hole, "experts", lambda _: "an expert stands after none")
        self._fail_any(
            bad.any(axis=1),
            "experts",
            lambda i: (
                f"expert {experts[i][bad[i]][0]} is out of range (there are {self.meta.n_experts})"
            ),
        )
        for first, second in itertools.combinations(experts.T, 2):  # cheaper than sorting rows
            again = first == second
            if self.meta.variable_top_k:
                again &= first != NO_EXPERT
            self._fail_any(again, "experts", _repeated(first))

    def _check_weights(self, weights: NDArray[np.float32]) -> None:
        bad = ~np.isfinite(weights).all(axis=1)
        self._fail_any(bad, "weights", lambda i: f"{_numbers(weights[i])} is not finite")
        rising = (np.diff(weights, axis=1) > 0).any(axis=1)
        self._fail_any(
            rising, "weights", lambda i: f"{_numbers(weights[i])} is not in descending order"
        )

    def _check_logits(self, name: str, logits: NDArray[np.float16]) -> None:
        # By their bits, and whole arrays first: a row at a time costs a recorder a hundred times
        # as much, and there is hardly ever anything to find.
        nan = (logits.view(np.uint16) & 0x7FFF) > 0x7C00
        if name.startswith(PREDICTED):  # all NaN: there is no prediction
            nan = nan != nan[:, :1]
        if nan.any():
            self._fail_any(nan.any(axis=1), name, lambda _: "there is a NaN")

    def _check_pass(self, rows: Rows) -> None:
        """The rows of one token are of one forward pass."""
        if (found := rows.pass_id) is None:
            return
        last = self._order.last
        token = rows.sequence.astype(np.uint64) << np.uint64(32) | rows.position
        begins = last is None or token[0] != np.uint64(last[0] << 32 | last[1])
        before = np.concatenate(([found[0] if begins else self._last_pass], found[:-1]))
        same = np.concatenate(([not begins], token[1:] == token[:-1]))
        self._fail_any(
            same & (found != before),
            "pass_id",
            lambda i: f"{found[i]} where the token's rows before have {before[i]}",
        )
        self._last_pass = int(found[-1])

    def _fail_any(self, bad: ArrayLike, column: str, tell: Callable[[int], str]) -> None:
        _fail_any(self.where, bad, column, tell, lambda i: self._row_name(self.n_rows + i))


class OrderChecker:
    """Checks that rows are sorted by (sequence, position, layer), that none comes twice, and that
    only as many are missing as the metadata says."""

    def __init__(
        self,
        meta: TraceMeta,
        where: str,
        row_name: Callable[[int], str] = "row {}".format,
        *,
        counts_missing: bool = False,
    ) -> None:
        self.meta = meta
        self.where = where
        self._row_name = row_name
        self._counts_missing = counts_missing
        self.n_rows = 0
        self.missing_rows = 0
        self.last: tuple[int, int, int] | None = None  # sequence, position, layer

    def add(
        self, sequence: NDArray[np.uint32], position: NDArray[np.uint32], layer: NDArray[np.uint16]
    ) -> None:
        """Check one more batch, [n] each. Raises TraceError naming the first wrong row."""
        if not len(layer):
            return
        last = self.last
        token = sequence.astype(np.uint64) << np.uint64(32) | position
        at = layer.astype(np.int64)
        first_token = token[0] if last is None else np.uint64(last[0] << 32 | last[1])
        first_layer = -1 if last is None else last[2]
        token_before = np.concatenate(([first_token], token[:-1]))
        layer_before = np.concatenate(([first_layer], at[:-1]))
        same = token == token_before
        self._fail_any(
            (token < token_before) | (same & (at <= layer_before)),
            "sequence, position, layer",
            lambda i: (
                f"({sequence[i]}, {position[i]}, {layer[i]}) does not come after "
                f"({int(token_before[i]) >> 32}, {int(token_before[i]) & 0xFFFFFFFF}, "
                f"{layer_before[i]})"
            ),
        )
        last_layer = self.meta.n_layers - 1
        gap = np.where(same, at - layer_before - 1, at + last_layer - layer_before)
        self.missing_rows += int(gap.sum())
        if not (self.meta.missing_rows or self._counts_missing):
            self._fail_any(
                gap > 0,
                "layer",
                lambda i: (
                    f"rows are missing before (sequence {sequence[i]}, position "
                    f"{position[i]}, layer {layer[i]})"
                ),
            )
        self.last = (int(sequence[-1]), int(position[-1]), int(layer[-1]))
        self.n_rows += len(layer)

    def finish(self) -> int:
        """Compare the number of missing rows, which is returned, with the metadata's, once all
        batches are in. Raises TraceError."""
        if self.last is not None:
            self.missing_rows += self.meta.n_layers - 1 - self.last[2]
        if not self._counts_missing and self.missing_rows != self.meta.missing_rows:
            raise TraceError(
                f"{self.where}: {self.missing_rows} (token, layer) rows are missing; the metadata "
                f"says {self.meta.missing_rows}"
            )
        return self.missing_rows

    def _fail_any(self, bad: ArrayLike, column: str, tell: Callable[[int], str]) -> None:
        _fail_any(self.where, bad, column, tell, lambda i: self._row_name(self.n_rows + i))


def _fail_any(
    where: str,
    bad: ArrayLike,
    column: str,
    tell: Callable[[int], str],
    row_name: Callable[[int], str],
) -> None:
    wrong = np.flatnonzero(bad)
    if len(wrong):
        i = int(wrong[0])
        raise TraceError(f"{where}: {row_name(i)}, column {column}: {tell(i)}")


def _repeated(experts: NDArray[np.uint16]) -> Callable[[int], str]:
    return lambda i: f"expert {experts[i]} is there more than once"


def _numbers(values: NDArray[Any]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values.tolist()) + "]"


def check_names(names: list[str], where: str) -> None:
    """Raise TraceError if a required column is not among `names`."""
    if absent := [name for name in REQUIRED if name not in names]:
        raise TraceError(f"{where}: no column {absent[0]}: not a routing trace")
