"""Traces as files that other programs read: counts of uses, JSON lines and .npz.

Each function writes to `path` as it goes: hand it a temporary name (`moepolicy.outputs`).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.jsontext import parse_json
from moeroute.schema import (
    NO_EXPERT,
    PHASES,
    PREDICTED,
    Rows,
    TraceError,
    TraceMeta,
    column_spec,
)
from moeroute.trace import Trace

LAYERS_NOTE = "model_layers"  # of an imported trace: the numbers that its layers had
_BATCH_ROWS = 1 << 18

Batch = tuple[NDArray[np.intp], NDArray[np.intp], Rows]
"""Rows, with the token of each, from 0 on in the batch, and the first row of each token."""


def model_layers(meta: TraceMeta, dense_layers: int = 0) -> list[int]:
    """The number in the model of each layer of a trace, which counts layers with experts alone.

    `dense_layers` is how many layers without experts come first, for a trace that does not say.
    """
    noted = meta.notes.get(LAYERS_NOTE)
    if noted is None:
        return list(range(dense_layers, dense_layers + meta.n_layers))
    found = parse_json(noted)
    if len(found) != meta.n_layers:
        raise TraceError(f"note {LAYERS_NOTE}: {len(found)} numbers of {meta.n_layers} layers")
    return [int(layer) for layer in found]


def logical_counts(trace: Trace, dense_layers: int = 0) -> NDArray[np.int64]:
    """Uses of each expert as SGLang, EPLB and KTransformers read them: [1, layers, experts].

    `layers` are the model's: those without experts have zeros.
    """
    layers = model_layers(trace.meta, dense_layers)
    counts = np.zeros((1, layers[-1] + 1, trace.meta.n_experts), np.int64)
    counts[0, layers] = trace.expert_counts()
    return counts


def write_counts(trace: Trace, path: Path, suffix: str, dense_layers: int = 0) -> None:
    """Write `logical_counts` under the name `logical_count`: .json, or .pt as SGLang's recorder.

    A .pt needs torch. Raises TraceError where it is not installed.
    """
    counts = logical_counts(trace, dense_layers)
    if suffix == ".json":
        path.write_text(json.dumps({"logical_count": counts.tolist()}), encoding="utf-8")
        return
    try:
        import torch
    except ImportError:
        raise TraceError(f"{path}: writing a PyTorch file needs torch: pip install torch") from None
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, path)


def write_lines(trace: Trace, path: Path) -> None:
    """Write JSON lines, a (token, layer) each, without logits, predictions and what a cache did."""
    names = [
        name
        for name in ("sequence", "position", "phase", "pass_id", "token_id", "layer")
        if trace.has(name)
    ]
    with path.open("w", encoding="utf-8") as file:
        for rows in trace.batches():
            columns = rows.columns()
            scalars = [columns[name].tolist() for name in names]
            at = names.index("phase")
            scalars[at] = [PHASES[phase] for phase in scalars[at]]
            experts = _lists(rows.experts, rows.experts)
            weights = None if rows.weights is None else _lists(rows.weights, rows.experts)
            for i, values in enumerate(zip(*scalars, strict=True)):
                line = dict(zip(names, values, strict=True)) | {"experts": experts[i]}
                if weights is not None:
                    line["weights"] = [float(f"{weight:.9g}") for weight in weights[i]]
                file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _lists(values: NDArray[Any], experts: NDArray[np.uint16]) -> list[list[Any]]:
    """Rows as lists, each as long as it has experts."""
    found: list[list[Any]] = values.tolist()
    lengths = (experts != NO_EXPERT).sum(axis=1).tolist()
    return [row[:n] for row, n in zip(found, lengths, strict=True)]


def write_npz(trace: Trace, path: Path) -> None:
    """Write the .npz that `importers.npz` reads and docs/traces.md specifies, array by array."""
    meta = trace.meta
    single = {
        **{name: getattr(meta, name) for name in _OF_META},
        "expert_bytes": meta.expert_bytes.get(meta.precision or ""),
    }
    n_tokens = sum(len(heads) for _, heads, _ in _tokens(trace))
    grid = (n_tokens, meta.n_layers)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in single.items():
            if value is not None:
                array = np.asarray(value)
                _add(archive, name, array.dtype, array.shape, iter([array]))
        for column in trace.columns:
            spec = column_spec(column)
            assert spec is not None
            if column in _OF_TOKEN:
                _add(archive, _OF_TOKEN[column], spec.dtype, grid[:1], _heads(trace, column))
            elif column in _OF_LAYER or column.startswith(PREDICTED):
                dtype = np.dtype(np.int32) if column == "experts" else spec.dtype
                width = (meta.width(column),) if spec.per_row else ()
                parts = _gridded(trace, column, dtype)
                _add(archive, _OF_LAYER.get(column, column), dtype, grid + width, parts)
        if meta.missing_rows:
            there = (_grid(trace, token, rows, None)[1] for token, _, rows in _tokens(trace))
            _add(archive, "valid", np.dtype(np.bool_), grid, there)


_OF_META = (
    *("n_experts", "top_k", "model", "revision", "n_shared_experts", "precision"),
    *("layer_bytes", "token_bytes", "prediction", "weight_rule"),
)
_OF_TOKEN = {
    **{"sequence": "seq", "position": "pos", "phase": "phase"},
    **{"token_id": "token_id", "pass_id": "pass_id"},
}
_OF_LAYER = {
    **{"experts": "ids", "weights": "weights"},
    **{"router_logits": "router_logits", "input_norm": "input_norm"},
}


def _add(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    parts: Iterator[NDArray[Any]],
) -> None:
    """One array of an .npz, written part by part."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part, dtype).tobytes())


def _tokens(trace: Trace) -> Iterator[Batch]:
    """The trace's rows, whole tokens together."""
    for start, stop in pairwise(_edges(trace)):
        rows = trace.rows(start, stop)
        of = rows.sequence.astype(np.uint64) << np.uint64(32) | rows.position
        heads = np.append(True, of[1:] != of[:-1])
        yield np.cumsum(heads) - 1, np.flatnonzero(heads), rows


def _edges(trace: Trace) -> list[int]:
    """Where to cut the rows, never inside a token."""
    size = max(2, _BATCH_ROWS // trace.meta.n_layers) * trace.meta.n_layers  # one may be cut off
    edges = [0]
    while edges[-1] < trace.n_rows:
        stop = min(trace.n_rows, edges[-1] + size)
        if trace.meta.missing_rows and stop < trace.n_rows:
            # Back to where the token of the last row begins.
            layer = trace.arrays("layer", start=stop - trace.meta.n_layers, stop=stop + 1)["layer"]
            begins = np.flatnonzero(np.diff(layer.astype(np.int64)) <= 0)
            stop = stop - trace.meta.n_layers + 1 + int(begins[-1])
        edges.append(stop)
    return edges


def _heads(trace: Trace, column: str) -> Iterator[NDArray[Any]]:
    return (rows.columns()[column][heads] for _, heads, rows in _tokens(trace))


def _gridded(trace: Trace, column: str, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """A column as [tokens, layers, ...]; experts that are none are -1, absent rows 0."""
    for token, _, rows in _tokens(trace):
        values = rows.columns()[column].astype(dtype)
        if column == "experts":
            values[rows.experts == NO_EXPERT] = -1
        found, there = _grid(trace, token, rows, values)
        if column == "experts":
            found[~there] = -1
        yield found


def _grid(
    trace: Trace, token: NDArray[np.intp], rows: Rows, values: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Rows' values by token and layer, and which of them are there."""
    shape = (int(token[-1]) + 1, trace.meta.n_layers)
    there = np.zeros(shape, np.bool_)
    there[token, rows.layer] = True
    if values is None:
        return there, there
    found = np.zeros((*shape, *values.shape[1:]), values.dtype)
    found[token, rows.layer] = values
    return found, there
