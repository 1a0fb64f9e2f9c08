"""What must hold for the rows of a trace, checked a batch at a time and told by row and column."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeroute.schema import (
    PHASES,
    PREDICTED,
    REQUIRED,
    Rows,
    TraceError,
    TraceMeta,
    column_spec,
)


class RowChecker:
    """Checks batches of rows that follow one another; the order holds across batches too.

    `where` starts every message: the file, or what else the rows are of. `row_name` says where
    row i stands in it: an importer's rows come from elsewhere in its file.
    """

    def __init__(
        self, meta: TraceMeta, where: str, row_name: Callable[[int], str] = "row {}".format
    ) -> None:
        self.meta = meta
        self.where = where
        self._row_name = row_name
        self.n_rows = 0
        self.missing_rows = 0
        self._last: tuple[int, int, int] | None = None  # sequence, position, layer
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
        for name in columns:
            if name == "router_logits" or name.startswith(PREDICTED):
                self._check_logits(name, columns[name])
        if (norm := rows.input_norm) is not None:
            self._fail_any(~np.isfinite(norm), "input_norm", lambda i: f"{norm[i]} is not finite")
        self._check_order(rows)
        self.n_rows += len(rows)

    def finish(self) -> None:
        """Check what only the end can tell. Raises TraceError."""
        if self._last is not None:
            self.missing_rows += self.meta.n_layers - 1 - self._last[2]
        if self.missing_rows != self.meta.missing_rows:
            raise TraceError(
                f"{self.where}: {self.missing_rows} (token, layer) rows are missing; the metadata "
                f"says {self.meta.missing_rows}"
            )

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
        self._fail_any(
            bad.any(axis=1),
            "experts",
            lambda i: (
                f"expert {experts[i][bad[i]][0]} is out of range (there are {self.meta.n_experts})"
            ),
        )
        for first, second in itertools.combinations(experts.T, 2):  # cheaper than sorting rows
            self._fail_any(first == second, "experts", _repeated(first))

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

    def _check_order(self, rows: Rows) -> None:
        """Sorted by (sequence, position, layer), no row twice, every layer from 0 on there."""
        last = self._last
        token = rows.sequence.astype(np.uint64) << np.uint64(32) | rows.position
        layer = rows.layer.astype(np.int64)
        first_token = token[0] if last is None else np.uint64(last[0] << 32 | last[1])
        first_layer = -1 if last is None else last[2]
        token_before = np.concatenate(([first_token], token[:-1]))
        layer_before = np.concatenate(([first_layer], layer[:-1]))
        same = token == token_before
        wrong = (token < token_before) | (same & (layer <= layer_before))
        self._fail_any(
            wrong,
            "sequence, position, layer",
            lambda i: (
                f"({rows.sequence[i]}, {rows.position[i]}, {rows.layer[i]}) does not come after "
                f"({int(token_before[i]) >> 32}, {int(token_before[i]) & 0xFFFFFFFF}, "
                f"{layer_before[i]})"
            ),
        )
        last_layer = self.meta.n_layers - 1
        gap = np.where(same, layer - layer_before - 1, layer + last_layer - layer_before)
        self.missing_rows += int(gap.sum())
        if not self.meta.missing_rows:
            self._fail_any(
                gap > 0,
                "layer",
                lambda i: (
                    f"rows are missing before (sequence {rows.sequence[i]}, position "
                    f"{rows.position[i]}, layer {rows.layer[i]})"
                ),
            )
        self._last = (int(rows.sequence[-1]), int(rows.position[-1]), int(rows.layer[-1]))

    def _fail_any(self, bad: ArrayLike, column: str, tell: Callable[[int], str]) -> None:
        wrong = np.flatnonzero(bad)
        if len(wrong):
            i = int(wrong[0])
            row = self._row_name(self.n_rows + i)
            raise TraceError(f"{self.where}: {row}, column {column}: {tell(i)}")


def _repeated(experts: NDArray[np.uint16]) -> Callable[[int], str]:
    return lambda i: f"expert {experts[i]} is there more than once"


def _numbers(values: NDArray[Any]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values.tolist()) + "]"


def check_names(names: list[str], where: str) -> None:
    """Raise TraceError if a required column is not among `names`."""
    if absent := [name for name in REQUIRED if name not in names]:
        raise TraceError(f"{where}: no column {absent[0]}: not a routing trace")
