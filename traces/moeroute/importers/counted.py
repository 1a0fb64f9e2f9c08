"""Files that count uses of experts and keep no order of tokens: no traces, but calibration.

Among them are SGLang's expert distribution recorder in its modes stat and per_pass, vLLM's and
DeepSeek's EPLB loads, KTransformers' frequencies, and MoE-Infinity's activation matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import NPY, TORCH, Source
from moeroute.importers.arrays import ArrayFile
from moeroute.importers.records import document, is_document
from moeroute.importers.torchfile import as_array, load_torch
from moeroute.schema import TraceError

Counts = NDArray[np.int64]  # [layers, logical experts]
_LOGICAL = "logical_count"
_PHYSICAL = "global_physical_count"
_LOAD = "expert_load_window"
_MAPS = ("last_physical_to_logical_map", "physical_to_logical_map")


def describe(source: Source) -> str | None:
    """What a file of counts is, in words; None where the file is none."""
    if source.kind == NPY:
        with source.open() as file:
            array = ArrayFile(source, file, "in the file")
        return "an array of counts" if _is_count(array.shape, array.dtype.kind) else None
    if is_document(source, "{"):
        start = source.start.decode("utf-8", "replace")
        return "counts as JSON" if f'"{_LOGICAL}"' in start else None
    return _describe_object(load_torch(source)) if source.kind == TORCH else None


def _describe_object(found: Any) -> str | None:
    if as_array(found) is not None:
        return "a tensor of counts" if _is_count(tuple(found.shape), "f") else None
    if not isinstance(found, dict):
        return None
    records = found.get("records")
    first = records[0] if isinstance(records, list) and records else None
    kinds = {
        "SGLang's expert distribution recorder, mode stat": _LOGICAL in found,
        "EPLB's expert loads": _LOAD in found,
        "SGLang's expert distribution recorder, mode per_pass": (
            isinstance(first, dict) and _PHYSICAL in first
        ),
    }
    return next((name for name, good in kinds.items() if good), None)


def _is_count(shape: tuple[int, ...], kind: str) -> bool:
    """[layers, experts], or more of them; whole numbers [n, layers, k] are ids instead."""
    return kind in "fiu" and (len(shape) == 2 or (len(shape) == 3 and kind == "f"))


def read(source: Source) -> Counts:
    """Uses of each logical expert, [layers, experts], summed over what the file keeps apart.

    Raises TraceError where the file is none of those above, or its counts are not counts.
    """
    if describe(source) is None:
        raise TraceError(f"{source.path}: {source.described}: holds no counts of experts' uses")
    if source.kind == NPY:
        with source.open() as file:
            return _summed(
                source, "the array", ArrayFile(source, file, "in the file").whole(), None
            )
    found = load_torch(source) if source.kind == TORCH else document(source)
    if not isinstance(found, dict):
        return _summed(source, "the tensor", _numbers(found), None)
    mapped = next((_numbers(found[name]) for name in _MAPS if name in found), None)
    if _LOGICAL in found:
        return _summed(source, _LOGICAL, _numbers(found[_LOGICAL]), None)
    if _LOAD in found:
        return _summed(source, _LOAD, _numbers(found[_LOAD]), mapped)
    parts = [
        _summed(source, f"record {i}: {_PHYSICAL}", _numbers(record.get(_PHYSICAL)), mapped)
        for i, record in enumerate(found["records"])
        if isinstance(record, dict)
    ]
    if len({part.shape for part in parts}) != 1:
        raise TraceError(f"{source.path}: its records are not all of one shape")
    total: Counts = np.sum(parts, axis=0)
    return total


def _numbers(value: Any) -> NDArray[Any] | None:
    tensor = as_array(value)
    if tensor is not None or value is None:
        return tensor
    try:
        found = np.array(value)
    except ValueError:
        return None
    return found if found.dtype.kind in "iuf" else None


def _summed(
    source: Source, name: str, found: NDArray[Any] | None, mapped: NDArray[Any] | None
) -> Counts:
    if found is None or found.ndim < 2 or found.ndim > 3 or 0 in found.shape:
        shape = "no table of numbers" if found is None else f"of shape {list(found.shape)}"
        raise TraceError(f"{source.path}: {name} is {shape}, not [layers, experts]")
    wide = found.astype(np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise TraceError(f"{source.path}: {name} holds numbers that count nothing")
    table = wide.reshape(-1, *wide.shape[-2:]).sum(axis=0)
    if mapped is not None:
        if mapped.shape != table.shape or (mapped < 0).any():
            raise TraceError(
                f"{source.path}: the map of physical experts is {list(mapped.shape)}, and {name} "
                f"{list(table.shape)}"
            )
        logical = np.zeros((len(table), int(mapped.max()) + 1))
        np.add.at(logical, (np.arange(len(table))[:, None], mapped), table)
        table = logical
    counts: Counts = np.rint(table).astype(np.int64)
    return counts
