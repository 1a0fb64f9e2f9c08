"""Which field of a table is what of a trace, and turning such fields into columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.records import named
from moeroute.schema import DECODE, PROMPT, TraceError, TraceUsageError

NAMES: dict[str, tuple[str, ...]] = {
    "layer": ("layer", "layer_idx", "layer_id", "layer_index", "l"),
    "experts": (
        *("experts", "selected_experts", "selected_ids", "expert_ids", "topk_experts"),
        *("topk_ids", "topk_indices", "top_indices", "routed_experts", "ids", "e"),
    ),
    "weights": (
        *("weights", "gate_weights", "topk_weights", "selected_probabilities", "expert_weights"),
        *("probs", "scores", "s"),
    ),
    "position": (
        *("position", "token", "token_idx", "token_index", "token_position", "pos", "tok", "t"),
    ),
    "sequence": (*("sequence", "sequence_id", "seq", "request", "request_id", "prompt_id", "p"),),
    "phase": ("phase", "ph"),
    "pass_id": ("pass_id", "forward_pass_id", "forward_pass", "batch_id", "step"),
    "token_id": ("token_id", "input_id"),
    "router_logits": ("router_logits", "logits"),
}
"""The fields that are looked for, by column, likeliest first."""
PHASE_WORDS: dict[str | int, int] = {
    **dict.fromkeys(("prompt", "prefill", "extend", "encoder", "decoder_prompt"), PROMPT),
    **dict.fromkeys(("decode", "generated", "generation", "decoder_generated"), DECODE),
    PROMPT: PROMPT,
    DECODE: DECODE,
}
LISTS = ("experts", "weights", "router_logits")
REQUIRED_FIELDS = ("layer", "experts")

Where = Callable[[int], str]  # in words, where the i-th value of a column is


def choose(there: Iterable[str], given: dict[str, str]) -> dict[str, str]:
    """The field of each column: those that are given, and those that are there by a known name."""
    names, taken = set(there), set(given.values())
    found = dict(given)
    for column, known in NAMES.items():
        name = next((name for name in known if name in names and name not in taken), None)
        if column not in found and name is not None:
            found[column] = name
    return found


def check_map(fields: dict[str, str]) -> None:
    """Raise TraceError for a column that no field can be mapped to."""
    if odd := [name for name in fields if name not in NAMES]:
        raise TraceUsageError(f"map: no column {odd[0]!r}; there are {', '.join(NAMES)}")


def at_path(record: Any, path: Sequence[str]) -> Any:
    """The value at a dotted path of a JSON object. Raises KeyError where there is none."""
    for step in path:
        if not isinstance(record, dict):
            raise KeyError(step)
        record = record[step]
    return record


def scalars(name: str, values: list[Any], where: Where) -> NDArray[Any]:
    """Whole numbers [n]. Raises TraceError by place for what is none."""
    found = np.array(values) if all(type(v) is int for v in values) else None
    if found is None or found.dtype.kind not in "iu":
        bad = next((i for i, v in enumerate(values) if type(v) is not int), 0)
        if all(isinstance(v, float) and v.is_integer() for v in values):
            return np.array(values).astype(np.int64)
        raise TraceError(f"{where(bad)}, column {name}: {_said(values[bad])}, not a whole number")
    return found


def phases(values: list[Any], where: Where) -> NDArray[np.uint8]:
    """Phases by word or number: [n]."""
    try:
        return np.array([PHASE_WORDS[value] for value in values], np.uint8)
    except (KeyError, TypeError):
        known = {str(word) for word in PHASE_WORDS}
        bad = next(i for i, v in enumerate(values) if str(v) not in known)
        raise TraceError(
            f"{where(bad)}, column phase: {_said(values[bad])}; known are "
            f"{', '.join(map(str, PHASE_WORDS))}"
        ) from None


def lists(name: str, values: list[Any], where: Where) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Lists of numbers as [n, longest], filled up with -1 (experts) or 0, and their lengths."""
    if bad := [i for i, v in enumerate(values) if type(v) is not list]:
        raise no_list(name, values[bad[0]], where(bad[0]))
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    try:
        flat = np.array(list(chain.from_iterable(values)))
    except ValueError:
        flat = np.array([None])
    if flat.ndim > 1 or (
        flat.size and flat.dtype.kind not in ("iu" if name == "experts" else "iuf")
    ):
        _refuse_entries(name, values, where)
    return padded(flat, lengths, -1 if name == "experts" else 0), lengths


def no_list(name: str, value: Any, place: str) -> TraceError:
    """The error for what should be a list."""
    return TraceError(f"{place}, column {name}: {_said(value)}, not a list")


def padded(flat: NDArray[Any], lengths: NDArray[np.int64], fill: float) -> NDArray[Any]:
    """Rows of these lengths, one after the other in `flat`, as [n, longest, at least 1]."""
    width = max(1, int(lengths.max(initial=1)))
    if (lengths == width).all() and flat.size:
        return flat.reshape(len(lengths), width)
    dtype = flat.dtype if flat.size else np.dtype(np.int64)
    if fill < 0 and dtype.kind == "u":
        dtype = np.dtype(np.int64)
    found = np.full((len(lengths), width), fill, dtype)
    found[np.arange(width) < lengths[:, None]] = flat
    return found


def check_lengths(experts: NDArray[np.int64], weights: NDArray[np.int64], where: Where) -> None:
    """Raise TraceError by place where a row has not a weight for each expert."""
    wrong = np.flatnonzero(experts != weights)
    if len(wrong):
        i = int(wrong[0])
        raise TraceError(
            f"{where(i)}, column weights: {weights[i]} weights for {experts[i]} experts"
        )


def _refuse_entries(name: str, values: list[Any], where: Where) -> None:
    kinds = (int,) if name == "experts" else (int, float)
    for i, row in enumerate(values):
        for entry in row:
            if type(entry) not in kinds:
                kind = "whole numbers" if name == "experts" else "numbers"
                raise TraceError(f"{where(i)}, column {name}: {_said(entry)} in a list of {kind}")
            if isinstance(entry, int) and abs(entry) >= 1 << 63:
                raise TraceError(f"{where(i)}, column {name}: {entry} is out of range")
    raise TraceError(f"{where(0)}, column {name}: cannot be read as numbers")


def _said(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 40 else text[:37] + '...'} is {named(value)}"
