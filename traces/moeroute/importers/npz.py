"""Routing as NumPy arrays: our own .npz layout, which docs/traces.md specifies, and bare arrays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import NPY, NPZ, Source
from moeroute.importers.arrays import Archive, ArrayFile, archive
from moeroute.importers.findings import Findings
from moeroute.importers.recording import (
    CHUNK_ROWS,
    PLACE,
    Columns,
    Facts,
    ImportOptions,
    Recording,
)
from moeroute.schema import PHASES, PREDICTED, TraceError, column_spec

_REQUIRED = ("ids", "seq", "pos")
_MOST_EXPERTS = 1 << 16
_OF_TOKEN = {"seq": "sequence", "pos": "position", "phase": "phase", "token_id": "token_id"}
_OF_TOKEN |= {"pass_id": "pass_id"}
_OF_LAYER = {"ids": "experts", "weights": "weights", "router_logits": "router_logits"}
_OF_LAYER |= {"input_norm": "input_norm"}
_NUMBERS = ("n_experts", "top_k", "layer_bytes", "token_bytes", "n_shared_experts")
_TEXTS = ("model", "revision", "precision", "prediction", "weight_rule")


def detect(source: Source) -> bool:
    """Whether the file is an .npz archive with expert ids, or with no logits to take them from."""
    if source.kind != NPZ:
        return False
    with archive(source) as arrays:
        return "ids" in arrays.names or "router_logits" not in arrays.names


def detect_array(source: Source) -> bool:
    """Whether the file is one array of whole numbers [tokens, layers, top-k]."""
    if source.kind != NPY:
        return False
    with source.open() as file:
        found = ArrayFile(source, file, "in the file")
    return len(found.shape) == 3 and found.dtype.kind in "iu"


def read(source: Source, _options: ImportOptions) -> Recording:
    """Read an .npz of routing.

    Arrays, N tokens, L layers, K experts of E: `ids` [N, L, K] (below 0: none), `seq` [N],
    `pos` [N]; and, if there are any, `phase` [N] (1 = decode), `pass_id` [N], `token_id` [N],
    `weights` [N, L, K], `router_logits` [N, L, E], `predicted_logits_1` ... [N, L, E],
    `input_norm` [N, L], `valid` [N, L] (false where the recorder lost the record), and single
    values `n_experts`, `top_k`, `model`, `revision`, `expert_bytes` with `precision`,
    `layer_bytes`, `token_bytes`, `n_shared_experts`, `prediction`, `weight_rule`. Raises
    TraceError naming the file and the array that is missing or wrong.
    """
    findings = Findings()
    with archive(source) as arrays:
        if absent := [name for name in _REQUIRED if name not in arrays.names]:
            raise TraceError(
                f"{source.path}: not an .npz of routing: no array {absent[0]}; it has "
                f"{', '.join(arrays.names) or 'none'}"
            )
        shape = _check(source, arrays)
        facts = _facts(source, arrays, shape)
        _tell_others(arrays, findings)
    return Recording(
        source.path,
        facts,
        _chunks(source, shape, findings),
        lambda place: f"token {place // shape[1]}, layer {place % shape[1]}",
        findings,
    )


def read_array(source: Source, _options: ImportOptions) -> Recording:
    """Read a .npy of ids [tokens, layers, top-k] of one request, as vLLM's `routed_experts`.

    Raises TraceError where the array has another shape.
    """
    findings = Findings()
    with source.open() as file:
        array = ArrayFile(source, file, "in the file")
    shape = array.shape
    if len(shape) != 3 or array.dtype.kind not in "iu" or 0 in shape[1:]:
        raise TraceError(
            f"{source.path}: the array is {array.dtype}{list(shape)}, not whole numbers [tokens, "
            "layers, top-k]"
        )
    facts = Facts(source.path.name.split(".npy")[0], n_layers=shape[1])
    facts.phase = "an array of ids does not tell phases: --prompt-tokens says them"

    def chunks() -> Iterator[Columns]:
        with source.open() as opened:
            start = 0
            array = ArrayFile(source, opened, "in the file")
            for ids in array.rows(max(1, CHUNK_ROWS // shape[1])):
                yield by_layer(ids, start)
                start += len(ids)

    return Recording(
        source.path,
        facts,
        chunks(),
        lambda place: f"token {place // shape[1]}, layer {place % shape[1]}",
        findings,
    )


def by_layer(ids: NDArray[Any], first: int, **of_token: NDArray[Any]) -> Columns:
    """Rows of ids [tokens, layers, top-k]; the first token is number `first` of its file.

    `of_token`: columns [tokens]; without `position` and `sequence`, the tokens are those of one
    sequence.
    """
    tokens, layers, _ = ids.shape
    columns = {
        "position": np.arange(first, first + tokens),
        "sequence": np.zeros(tokens, np.uint32),
    } | of_token
    return {name: np.repeat(column, layers) for name, column in columns.items()} | {
        "layer": np.tile(np.arange(layers, dtype=np.uint16), tokens),
        "experts": ids.reshape(tokens * layers, -1),
        PLACE: np.arange(first * layers, (first + tokens) * layers),
    }


def _facts(source: Source, arrays: Archive, shape: tuple[int, ...]) -> Facts:
    facts = Facts(source.path.name.split(".npz")[0], n_layers=shape[1])
    facts.n_experts = arrays.number("n_experts", shape[2], _MOST_EXPERTS)
    facts.n_experts_unknown, facts.phase = "no array n_experts", "no array phase"
    facts.top_k = arrays.number("top_k", 1, _MOST_EXPERTS)
    if facts.top_k not in (None, shape[2]):
        raise TraceError(f"{source.path}: top_k is {facts.top_k}, but ids holds {shape[2]} a token")
    for name in ("layer_bytes", "token_bytes"):
        setattr(facts, name, arrays.number(name, 1, 1 << 62))
    facts.n_shared_experts = arrays.number("n_shared_experts", 0, _MOST_EXPERTS) or 0
    texts = {name: str(arrays[name].whole()) for name in _TEXTS if name in arrays.names}
    for name in ("model", "revision", "prediction", "weight_rule"):
        setattr(facts, name, texts.get(name) or getattr(facts, name))
    if size := arrays.number("expert_bytes", 1, 1 << 62):
        facts.expert_bytes = {texts.get("precision", "as-run"): size}
    if any(name.startswith(PREDICTED) for name in arrays.names):
        facts.prediction = facts.prediction or "as recorded"
    return facts


def _wanted(arrays: Archive) -> dict[str, str]:
    """The arrays with an entry a token, and the column that each becomes."""
    known = _OF_TOKEN | _OF_LAYER
    known |= {name: name for name in arrays.names if name.startswith(PREDICTED)}
    return {
        name: column
        for name, column in known.items()
        if name in arrays.names and column_spec(column) is not None
    }


def _tell_others(arrays: Archive, findings: Findings) -> None:
    known = {*_wanted(arrays), "valid", "expert_bytes", *_NUMBERS, *_TEXTS}
    if others := [name for name in arrays.names if name not in known]:
        findings.note("not_imported", "arrays " + ", ".join(others))


def _check(source: Source, arrays: Archive) -> tuple[int, ...]:
    """The shape of `ids`; TraceError where an array does not go with it."""
    shape = arrays["ids"].shape
    if len(shape) != 3 or 0 in shape[1:]:
        raise TraceError(
            f"{source.path}: array ids has shape {list(shape)}, not [tokens, layers, top-k]"
        )
    token, record = shape[:1], shape[:2]
    expected: dict[str, tuple[tuple[int, ...], str]] = {  # shape, kinds of number
        "ids": (shape, "iu"),
        **dict.fromkeys(("seq", "pos", "token_id", "pass_id"), (token, "iu")),
        "phase": (token, "iubU"),
        "weights": (shape, "f"),
        "valid": (record, "iub"),
        "input_norm": (record, "f"),
    }
    for name in _wanted(arrays):
        if _OF_LAYER.get(name) == "router_logits" or name.startswith(PREDICTED):
            found = arrays[name]
            expected[name] = ((*record, found.shape[-1] if found.shape else 0), "f")
    for name, (want, kinds) in expected.items():
        if name not in arrays.names:
            continue
        found = arrays[name]
        if found.shape != want or found.dtype.kind not in kinds:
            raise TraceError(
                f"{source.path}: array {name} is {found.dtype}{list(found.shape)}, not "
                f"{'real' if kinds == 'f' else 'whole'} numbers {list(want)} "
                f"(ids is {list(shape)}: tokens, layers, top-k)"
            )
    return shape


def _chunks(source: Source, shape: tuple[int, ...], findings: Findings) -> Iterator[Columns]:
    tokens = max(1, CHUNK_ROWS // shape[1])
    lost = 0
    with archive(source) as arrays:
        wanted = _wanted(arrays)
        streams = {name: arrays[name].rows(tokens) for name in wanted}
        if "valid" in arrays.names:
            streams["valid"] = arrays["valid"].rows(tokens)
        for start in count(step=tokens):
            parts = {
                name: part for name, s in streams.items() if (part := next(s, None)) is not None
            }
            if not parts:
                break
            valid = parts.pop("valid", np.ones(parts["ids"].shape[:2])).astype(np.bool_)
            lost += int((~valid.any(axis=1)).sum())
            yield _rows(source, parts, wanted, valid, start)
    if lost == shape[0]:
        raise TraceError(f"{source.path}: holds no routing: {shape[0]} tokens, {lost} of them lost")
    findings.count(
        "lost_tokens", lost, "tokens dropped: the recorder kept no layer of them", of=shape[0]
    )


def _rows(
    source: Source,
    parts: Columns,
    wanted: dict[str, str],
    valid: NDArray[np.bool_],
    start: int,
) -> Columns:
    token, layer = np.nonzero(valid)
    columns = {PLACE: (start + token) * valid.shape[1] + layer, "layer": layer}
    for name, part in parts.items():
        known = _phases(source, part, start) if name == "phase" else part
        columns[wanted[name]] = known[token] if name in _OF_TOKEN else known[token, layer]
    return columns


def _phases(source: Source, found: NDArray[Any], start: int) -> NDArray[Any]:
    """Phases as numbers; they may be the words prompt and decode."""
    if found.dtype.kind != "U":
        return found
    known = np.isin(found, PHASES)
    if not known.all():
        at = int(np.argmin(known))
        raise TraceError(
            f"{source.path}: token {start + at}, column phase: {str(found[at])!r} is no phase; "
            f"there are {', '.join(PHASES)}"
        )
    number: NDArray[np.uint8] = (found == PHASES[1]).astype(np.uint8)
    return number
