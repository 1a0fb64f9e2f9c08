"""Taking in an importer's chunks: number types, experts that are none, and what all rows tell
together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.numbering import Numbering
from moeroute.importers.recording import PLACE, Columns, Recording
from moeroute.importers.spool import Spool
from moeroute.schema import NO_EXPERT, TraceError, column_spec

KEYS = ("sequence", "position", "layer", "phase", "pass_id")  # kept in memory, the rest on disk
BY_SLOT = ("experts", "weights", "residency", "loaded_bytes")  # [n, K]
_ALL_EXPERTS = 1 << 16


class Intake:
    """The rows of a recording, keys in memory and other columns in `folder`.

    Raises TraceError by place for a value that no trace can hold.
    """

    def __init__(self, recording: Recording, folder: Path) -> None:
        self.recording = recording
        self.spool = Spool(folder)
        self.numbering = Numbering()
        self.n_rows = 0
        self.dropped = 0
        """Rows without any expert: the token was dropped, or filled a batch up."""
        self.fewer = 0
        """Rows that chose fewer experts than others of their chunk."""
        self.uses = np.zeros(_ALL_EXPERTS, np.int64)
        self.n_counted = 0  # rows in `uses`: those of layers without experts are not
        self.empty_of_layer = np.zeros(_ALL_EXPERTS, np.int64)
        self.rows_of_layer = np.zeros(_ALL_EXPERTS, np.int64)
        self.alike_of_layer = np.zeros(_ALL_EXPERTS, np.int64)
        """Rows of a layer that name one expert K times, as recorders fill layers without any."""
        self._keys: dict[str, list[NDArray[Any]]] = {}
        self._in_all: set[str] | None = None
        self._lost: set[str] = set()
        self._widths: set[int] = set()
        for chunk in recording.chunks:
            if len(chunk["layer"]):
                self._add(dict(chunk))

    @property
    def partial(self) -> list[str]:
        """Columns that only some rows have."""
        return sorted(self._lost)

    @property
    def variable(self) -> bool:
        """Whether rows differ in how many experts they chose."""
        return bool(self.fewer) or len(self._widths) > 1

    def keys(self) -> Columns:
        """The key columns, each joined, and let go of here."""
        return {
            name: np.concatenate(self._keys.pop(name))
            for name in list(self._keys)
            if name not in self._lost
        }

    def names(self) -> list[str]:
        """Columns on disk that all rows have, without PLACE."""
        return [n for n in self.spool.files if n not in self._lost and n != PLACE]

    def where(self, row: int) -> str:
        """In words, where in the file row `row` of those taken in is."""
        at = slice(row, row + 1)
        return self.recording.place(int(self.spool.rows(PLACE, at)[0]))

    def _add(self, columns: Columns) -> None:
        n = len(columns["layer"])
        columns.setdefault(PLACE, np.arange(self.n_rows, self.n_rows + n) + self.dropped)
        self.numbering.fill(columns)
        columns = self._choices(columns)
        self._remember(set(columns))
        fitted = {
            name: column.astype(np.int64) if name == PLACE else self._fitted(name, column, columns)
            for name, column in columns.items()
        }
        self._count(fitted)
        for name, column in fitted.items():
            if name in KEYS:
                self._keys.setdefault(name, []).append(column)
            else:
                self.spool.add(name, column, NO_EXPERT if name == "experts" else 0)
        self.n_rows += len(fitted["layer"])

    def _choices(self, columns: Columns) -> Columns:
        """Experts that are none go to the end of their row; a row of none goes altogether."""
        experts = columns["experts"]
        if experts.ndim != 2 or not experts.shape[1]:
            raise TraceError(
                f"{self.recording.path}: {self._near(columns)}, column experts: no list of ids"
            )
        none = experts < 0
        if not none.any():
            return columns
        empty = none.all(axis=1)
        self.dropped += int(empty.sum())
        self.empty_of_layer += np.bincount(columns["layer"][empty], minlength=_ALL_EXPERTS)
        self.fewer += int((none.any(axis=1) & ~empty).sum())
        columns = {name: column[~empty] for name, column in columns.items()}
        none = none[~empty]
        order = np.argsort(none, axis=1, kind="stable")
        none = np.take_along_axis(none, order, axis=1)
        for name in columns.keys() & set(BY_SLOT):
            moved = np.take_along_axis(columns[name], order, axis=1)
            if moved.dtype.kind == "u":
                moved = moved.astype(np.int64)
            columns[name] = np.where(none, NO_EXPERT if name == "experts" else 0, moved)
        return columns

    def _remember(self, names: set[str]) -> None:
        if self._in_all is None:
            self._in_all = names
        self._lost |= self._in_all ^ names
        self._in_all &= names

    def _fitted(self, name: str, found: NDArray[Any], columns: Columns) -> NDArray[Any]:
        """A column in a trace's number type."""
        spec = column_spec(name)
        assert spec is not None
        if found.dtype.kind not in "iufb" or (found.ndim > 1) != bool(spec.per_row):
            raise TraceError(
                f"{self.recording.path}: {self._near(columns)}, column {name}: holds "
                f"{found.dtype}{list(found.shape)}, not {spec.per_row or 'one'} numbers a row"
            )
        with np.errstate(invalid="ignore", over="ignore"):
            fitted = found.astype(spec.dtype)
        if spec.dtype.kind == "u":
            wrong = fitted != found
            if wrong.any():
                row = int(np.nonzero(wrong)[0][0])
                raise TraceError(
                    f"{self.recording.path}: {self.recording.place(int(columns[PLACE][row]))}, "
                    f"column {name}: {found[wrong].flat[0]} is out of range"
                )
        return fitted

    def _near(self, columns: Columns) -> str:
        return self.recording.place(int(columns[PLACE][0]))

    def _count(self, fitted: Columns) -> None:
        experts, layer = fitted["experts"], fitted["layer"]
        if not len(layer):
            return
        self._widths.add(experts.shape[1])
        self.rows_of_layer += np.bincount(layer, minlength=_ALL_EXPERTS)
        if experts.shape[1] > 1:
            alike = (experts == experts[:, :1]).all(axis=1)
            self.alike_of_layer += np.bincount(layer[alike], minlength=_ALL_EXPERTS)
            experts = experts[~alike]
        self.n_counted += len(experts)
        self.uses += np.bincount(experts.ravel(), minlength=_ALL_EXPERTS)
