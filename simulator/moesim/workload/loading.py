"""Reading a trace into a workload, a block of rows at a time.

Into memory, or into a folder of plain arrays that are mapped: then a trace of any length takes no
more memory than is being worked on, and processes that map one folder share it.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from moepolicy import demand_order
from moepolicy.library.clairvoyant.future import next_use_blocks
from moeroute import DECODE, Trace
from moeroute.schema import NO_EXPERT, prediction_column
from numpy.typing import NDArray

from moesim.errors import SimulationError
from moesim.workload.passes import RowsInTime, is_alone
from moesim.workload.steps import Workload, changes

BLOCK_ROWS = 1 << 18  # rows that are made into steps together
SKELETON = "workload.pickle"  # written last: where it is, the arrays are whole

Columns = dict[str, NDArray[Any]]
Shape = tuple[np.dtype[Any], tuple[int, ...]]


def load_workload(
    trace: Trace,
    *,
    logits: bool = False,
    predictions: bool = False,
    token_ids: bool = False,
    rows: bool = False,
    folder: Path | None = None,
) -> Workload:
    """Read a trace's steps; gate logits, predictions and token ids only if some policy looks at
    them, and what each token's gate chose (``rows``) only if one routes.

    With ``folder``, an empty one, its arrays lie there, as `attached` finds them. Raises TraceError
    where the trace lacks a column or has rows out of order, SimulationError where its rows make no
    steps.
    """
    if trace.n_rows == 0:
        raise SimulationError(f"{trace.path}: the trace has no rows")
    trace.check_order()
    keep: _Memory | _Folder = _Memory() if folder is None else _Folder(folder)
    horizon = trace.meta.horizon if predictions else 0
    in_time = RowsInTime(trace)
    _read_steps(in_time, keep)
    in_time.release()
    gates = [prediction_column(ahead + 1) for ahead in range(horizon)]
    for name in (["router_logits"] if logits else []) + gates:
        for start in range(0, trace.n_rows, BLOCK_ROWS):
            keep.add(name, in_time.arrays(name, start=start, stop=start + BLOCK_ROWS)[name])
        in_time.release()
    about = {"meta": trace.meta, "title": trace.title, "digest": trace.digest}
    if token_ids:
        _keep_rows(in_time, keep, "token_id", "token_ids", np.int32)
    if rows and trace.meta.variable_top_k:
        raise SimulationError(
            f"{trace.path}: its tokens choose different numbers of experts, which policies that "
            "route cannot replay: they choose as many for each"
        )
    if rows:
        _keep_rows(in_time, keep, "experts", "row_experts", np.int32)
        _keep_rows(in_time, keep, "weights", "row_weights", np.float32)
    workload = _assembled(about, keep.arrays(), tuple(keep.maps))
    if isinstance(keep, _Folder):
        keep.derive(workload, about)
        return attached(keep.folder)
    return workload


def _keep_rows(
    rows: RowsInTime, keep: _Memory | _Folder, column: str, name: str, dtype: type[np.generic]
) -> None:
    """Keep a column of the trace row by row."""
    for start in range(0, rows.trace.n_rows, BLOCK_ROWS):
        part = rows.arrays(column, start=start, stop=start + BLOCK_ROWS)[column]
        keep.add(name, part.astype(dtype))
    rows.release()


def remade(
    workload: Workload, title: str, blocks: Iterable[Columns], folder: Path | None
) -> Workload:
    """A workload of the steps whose columns ``blocks`` give a stretch at a time, of the model and
    trace of ``workload``; with ``folder``, an empty one, its arrays lie there."""
    keep: _Memory | _Folder = _Memory() if folder is None else _Folder(folder)
    for columns in blocks:
        for name, part in columns.items():
            keep.add(name, part)
        workload.release()
    about = {"meta": workload.meta, "title": title, "digest": workload.digest}
    found = _assembled(about, keep.arrays(), tuple(keep.maps))
    if isinstance(keep, _Folder):
        keep.derive(found, about)
        return attached(keep.folder)
    return found


def attached(folder: Path) -> Workload:
    """The workload that was loaded into ``folder``, which must be trusted. The folder may go then:
    what is mapped stays."""
    about, shapes, derived = pickle.loads((folder / SKELETON).read_bytes())
    maps: list[mmap.mmap] = []
    arrays = {name: _mapped(folder / name, of, maps) for name, of in shapes.items()}
    more = {name: arrays.pop(name) for name in ("next_use", "begins_pass")}
    workload = _assembled(about, arrays, tuple(maps))
    vars(workload).update(derived | more)  # what its cached properties would find
    return workload


def _assembled(about: dict[str, Any], arrays: dict[str, Any], maps: tuple[Any, ...]) -> Workload:
    predicted = [name for name in arrays if name.startswith("predicted")]
    return Workload(
        **about,
        logits=arrays.pop("router_logits", None),
        predicted=tuple(arrays.pop(name) for name in predicted),
        maps=maps,
        **arrays,
    )


class _Memory:
    """Arrays that grow a block at a time."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self.maps: list[mmap.mmap] = []  # none

    def add(self, name: str, part: NDArray[Any]) -> None:
        self._parts.setdefault(name, []).append(part)

    def arrays(self) -> Columns:
        """Each joined; its parts are let go as soon as it is."""
        return {name: _joined(self._parts.pop(name)) for name in list(self._parts)}


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Folder:
    """Arrays that grow a block at a time, each in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: list[mmap.mmap] = []
        self._shapes: dict[str, Shape] = {}

    def add(self, name: str, part: NDArray[Any]) -> None:
        with (self.folder / name).open("ab") as file:
            np.ascontiguousarray(part).tofile(file)
        _, before = self._shapes.get(name, (part.dtype, (0,)))
        self._shapes[name] = part.dtype, (before[0] + len(part), *part.shape[1:])

    def arrays(self) -> Columns:
        return {
            name: _mapped(self.folder / name, of, self.maps) for name, of in self._shapes.items()
        }

    def derive(self, workload: Workload, about: dict[str, Any]) -> None:
        """Write what is derived, once for all who will attach, and the skeleton."""
        with (self.folder / "next_use").open("wb") as file:
            for block, found in next_use_blocks(workload.keys, workload.offsets):
                os.pwrite(file.fileno(), found.tobytes(), block.start * found.itemsize)
                workload.release()
        self._shapes["next_use"] = np.dtype(np.int64), workload.keys.shape
        for start in range(0, workload.n_steps, BLOCK_ROWS):
            rows = workload.rows[max(0, start - 1) : start + BLOCK_ROWS, 0]
            changed = changes(rows)
            self.add("begins_pass", changed if start else np.append(True, changed))
            workload.release()
        derived = {}
        for name, value in vars(Workload).items():
            if isinstance(value, cached_property) and name not in self._shapes:
                derived[name] = getattr(workload, name)
        (self.folder / SKELETON).write_bytes(pickle.dumps((about, self._shapes, derived)))


def _mapped(file: Path, of: Shape, maps: list[mmap.mmap]) -> NDArray[Any]:
    """An array that lies in ``file``; its mapping joins ``maps``."""
    dtype, shape = of
    with file.open("rb") as opened:
        # Copy-on-write: compiled code sees a plain writable array, the file stays as it is.
        maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    return np.frombuffer(maps[-1], dtype).reshape(shape)


def _read_steps(rows: RowsInTime, keep: _Memory | _Folder) -> None:
    trace = rows.trace
    keep.add("offsets", np.zeros(1, np.int64))
    n_steps = n_demands = 0
    sequence = None
    for first, columns in _blocks(rows):
        _check_range(trace, columns, first)
        of = columns["sequence"]
        begins = np.flatnonzero(np.append(of[0] != sequence, changes(of)))
        sequence = of[-1]
        if rows.apart is not None:
            begins = (
                rows.apart[slice(*np.searchsorted(rows.apart, [first, first + len(of)]))] - first
            )
        keep.add("row_layer", columns["layer"].astype(np.int32))
        parts = _Steps(columns, trace.meta.n_experts, first).parts
        first_rows = np.concatenate([part["rows"][:, 0] for part in parts])
        keep.add("starts", n_steps + np.searchsorted(first_rows, first + begins))
        n_steps += len(first_rows)
        for part in parts:
            offsets = n_demands + np.cumsum(part.pop("n_keys"), dtype=np.int64)
            n_demands = int(offsets[-1])
            keep.add("offsets", offsets)
            for name, array in part.items():
                keep.add(name, array)


def _blocks(rows: RowsInTime) -> Iterator[tuple[int, Columns]]:
    """The trace's rows in blocks that begin with a token or prompt, each after the number of its
    first row. A prompt, or what made one forward pass, is never cut."""
    trace = rows.trace
    names = ["sequence", "position", "phase", "layer", "experts"]
    names += [name for name in ("weights", "pass_id") if trace.has(name)]
    left: Columns = {}
    first = 0
    for start in range(0, trace.n_rows, BLOCK_ROWS):
        columns = rows.arrays(*names, start=start, stop=start + BLOCK_ROWS)
        if left:
            columns = {name: np.concatenate([left[name], columns[name]]) for name in names}
        n = len(columns["layer"])
        cut = n if start + BLOCK_ROWS >= trace.n_rows else _last_begin(columns)
        left = {name: column[cut:] for name, column in columns.items()}
        if cut:
            yield first, {name: column[:cut] for name, column in columns.items()}
        first += cut


def _last_begin(columns: Columns) -> int:
    """The last row that begins a decoded token, a prompt or a recorded pass; 0 where only the first
    does."""
    if "pass_id" in columns:
        found = np.flatnonzero(changes(columns["pass_id"]))
        return int(found[-1]) + 1 if len(found) else 0
    decode = columns["phase"] == DECODE
    new_token = changes(columns["sequence"]) | changes(columns["position"])
    found = np.flatnonzero(_edges(columns) | (new_token & decode[1:]))
    return int(found[-1]) + 1 if len(found) else 0


def _edges(columns: Columns) -> NDArray[np.bool_]:
    """Where a stretch of decoded tokens or a prompt ends, and the next row begins another."""
    if "pass_id" in columns:
        alone = columns["alone"]
        ends: NDArray[np.bool_] = changes(columns["pass_id"]) & ~(alone[1:] & alone[:-1])
        return ends
    decode = columns["phase"] == DECODE
    edges: NDArray[np.bool_] = changes(decode) | (changes(columns["sequence"]) & ~decode[1:])
    return edges


def _check_range(trace: Trace, columns: Columns, first: int) -> None:
    for name, limit in (("experts", trace.meta.n_experts), ("layer", trace.meta.n_layers)):
        wrong = columns[name] >= limit
        if name == "experts" and trace.meta.variable_top_k:
            wrong &= columns[name] != NO_EXPERT
        if wrong.any():
            row = first + int(np.argwhere(wrong)[0, 0])
            raise SimulationError(
                f"{trace.path}: column {name}, row {row}: a value of {limit} or more, "
                f"but the trace's metadata says {limit} {name.rstrip('s')}s"
            )


class _Steps:
    """Cuts a block of rows into stretches of decoded tokens and prompts, and each into steps."""

    def __init__(self, columns: Columns, n_experts: int, first_row: int) -> None:
        self.layer = columns["layer"].astype(np.int32)
        self.experts = columns["experts"].astype(np.int32)
        if "weights" in columns:
            self.weights = np.asarray(columns["weights"], np.float32)
        else:  # a recorder that had none counts every expert alike
            self.weights = np.full(self.experts.shape, 1.0 / self.experts.shape[1], np.float32)
        self.n_experts = n_experts
        self.first_row = first_row
        self.parts: list[Columns] = []
        self.decode = decode = columns["phase"] == DECODE
        new_token = changes(columns["sequence"]) | changes(columns["position"])
        self.token_starts = np.append(np.flatnonzero(np.append(True, new_token)), len(decode))
        if "pass_id" in columns:
            columns["alone"] = decode = is_alone(columns, self.token_starts)
        edges = [0, *(np.flatnonzero(_edges(columns)) + 1).tolist(), len(decode)]
        for first, last in pairwise(edges):
            (self._decoded if decode[first] else self._prompt)(first, last)

    def _decoded(self, first: int, last: int) -> None:
        """Rows first..last-1 are decoded tokens: each row is a step."""
        n, top_k = last - first, self.experts.shape[1]
        experts, weights = self.experts[first:last], self.weights[first:last]
        order = np.argsort(-weights, axis=1, kind="stable")
        experts = np.take_along_axis(experts, order, axis=1)
        layer = self.layer[first:last]
        keys = (experts + layer[:, None] * self.n_experts).astype(np.int32)
        weights = np.take_along_axis(weights, order, axis=1)
        n_keys = np.full(n, top_k, np.int32)
        if (none := experts == NO_EXPERT).any():
            n_keys = (top_k - none.sum(axis=1)).astype(np.int32)
            keys, weights = keys[~none], weights[~none]
        bounds = np.searchsorted(self.token_starts, np.arange(first, last), side="right")
        self.parts.append(
            {
                "keys": keys.ravel(),
                "weights": weights.ravel(),
                "routed": np.ones(keys.size, np.int32),
                "n_keys": n_keys,
                "layer": layer,
                "tokens": np.ones(n, np.int32),
                "decode": np.ones(n, np.bool_),
                "rows": self.first_row
                + np.stack([self.token_starts[bounds - 1], self.token_starts[bounds]], axis=1),
            }
        )

    def _prompt(self, first: int, last: int) -> None:
        """Rows first..last-1 are one prompt or one recorded forward pass: one step a layer,
        with the union of its experts."""
        layers = self.layer[first:last]
        for layer in np.unique(layers):
            at = first + np.flatnonzero(layers == layer)
            experts, weights = demand_order(self.experts[at], self.weights[at])
            uses = np.bincount(self.experts[at].ravel(), minlength=self.n_experts)
            real = experts != NO_EXPERT
            experts, weights = experts[real], weights[real]
            self.parts.append(
                {
                    "keys": (experts + layer * self.n_experts).astype(np.int32),
                    "weights": weights,
                    "routed": uses[experts].astype(np.int32),
                    "n_keys": np.array([len(experts)], np.int32),
                    "layer": np.array([layer], np.int32),
                    "tokens": np.array([len(at)], np.int32),
                    "decode": self.decode[at].all(keepdims=True),
                    "rows": self.first_row + np.array([[first, last]], np.int64),
                }
            )
