"""Routing as NumPy arrays in an .npz archive."""

from __future__ import annotations

import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import NPZ, Source
from moeroute.importers.findings import Findings
from moeroute.importers.recording import Recording, fit
from moeroute.schema import DECODE, TraceError, TraceMeta

Arrays = dict[str, NDArray[Any]]

_REQUIRED = ("ids", "seq", "pos")
_MOST_EXPERTS = 1 << 16


def detect(source: Source) -> bool:
    """Whether the file is an .npz archive."""
    return source.kind == NPZ


def read(source: Source, model: str | None = None) -> Recording:
    """Read an .npz of routing.

    Arrays, N tokens, L layers, K experts: `ids` [N, L, K], `seq` [N], `pos` [N]; `phase` [N]
    (1 = decode; without it all are), `n_experts` (without it guessed from the largest id);
    `top_k` and `weights` [N, L, K] if there are any; `valid` [N, L], false where the recorder lost
    the record. `model` defaults to the file's name. Raises TraceError naming the file and the
    array that is missing or wrong.
    """
    findings = Findings()
    arrays = _load(source, findings)
    _check(source, arrays)
    ids = arrays["ids"]
    valid = arrays.get("valid", np.ones(ids.shape[:2])).astype(np.bool_)
    lost = int((~valid.any(axis=1)).sum())
    findings.count(
        "lost_tokens", lost, "tokens dropped: the recorder kept no layer of them", of=len(ids)
    )
    token, layer = np.nonzero(valid)
    if not len(token):
        raise TraceError(f"{source.path}: holds no routing: {len(ids)} tokens, {lost} of them lost")
    columns = {
        "sequence": arrays["seq"][token],
        "position": arrays["pos"][token],
        "phase": _phase(arrays, findings)[token],
        "layer": layer,
        "experts": ids[token, layer],
    }
    if "weights" in arrays:
        columns["weights"] = arrays["weights"][token, layer]
    meta = TraceMeta(
        source="imported",
        model=model or source.path.name.split(".npz")[0],
        n_layers=ids.shape[1],
        n_experts=_n_experts(source, arrays, columns["experts"], findings),
        top_k=ids.shape[2],
    )
    return Recording(
        source.path,
        meta,
        columns,
        lambda row: f"token {token[row]}, layer {layer[row]}",
        findings,
    )


def _phase(arrays: Arrays, findings: Findings) -> NDArray[Any]:
    if "phase" in arrays:
        return arrays["phase"]
    findings.note("phase", f"unknown (no array phase): all {len(arrays['ids'])} tokens are decode")
    return np.full(len(arrays["ids"]), DECODE, np.uint8)


def _n_experts(source: Source, arrays: Arrays, experts: NDArray[Any], findings: Findings) -> int:
    if "n_experts" in arrays:
        return fit(
            source.path, "n_experts", arrays["n_experts"], arrays["ids"].shape[2], _MOST_EXPERTS
        )
    largest = fit(source.path, "the largest id", experts.max(), 0, _MOST_EXPERTS - 1)
    findings.note(
        "n_experts", f"unknown (no array n_experts): {largest + 1} guessed from the largest id"
    )
    return largest + 1


def _load(source: Source, findings: Findings) -> Arrays:
    """The arrays of the layout; others are not even read, so a pickle among them does no harm."""
    known = (*_REQUIRED, "phase", "n_experts", "top_k", "weights", "valid")
    arrays = {}
    name = ""
    try:
        with source.open() as file, np.load(file, allow_pickle=False) as archive:
            if absent := [name for name in _REQUIRED if name not in archive.files]:
                raise TraceError(
                    f"{source.path}: not an .npz of routing: no array {absent[0]}; it has "
                    f"{', '.join(sorted(archive.files)) or 'none'}"
                )
            others = sorted(set(archive.files) - set(known))
            for name in known:
                if name in archive.files:
                    arrays[name] = archive[name]
    except TraceError:
        raise
    except zipfile.BadZipFile as error:
        raise TraceError(f"{source.path}: truncated or damaged zip archive ({error})") from None
    except (ValueError, EOFError, AttributeError, KeyError, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise TraceError(
                f"{source.path}: array {name} holds Python objects, which are never unpickled: "
                "save it as numbers"
            ) from None
        raise TraceError(f"{source.path}: array {name} cannot be read ({error})") from None
    if others:
        findings.note("not_imported", "arrays " + ", ".join(others))
    return arrays


def _check(source: Source, arrays: Arrays) -> None:
    shape = arrays["ids"].shape
    if len(shape) != 3 or 0 in shape[1:]:
        raise TraceError(
            f"{source.path}: array ids has shape {list(shape)}, not [tokens, layers, top-k]"
        )
    token, record = shape[:1], shape[:2]
    expected: dict[str, tuple[tuple[int, ...], str]] = {  # shape, kinds of number
        "ids": (shape, "iu"),
        "seq": (token, "iu"),
        "pos": (token, "iu"),
        "phase": (token, "iub"),
        "n_experts": ((), "iu"),
        "top_k": ((), "iu"),
        "weights": (shape, "f"),
        "valid": (record, "iub"),
    }
    for name, (want, kinds) in expected.items():
        found = arrays.get(name)
        if found is not None and (found.shape != want or found.dtype.kind not in kinds):
            raise TraceError(
                f"{source.path}: array {name} is {found.dtype}{list(found.shape)}, not "
                f"{'real' if kinds == 'f' else 'whole'} numbers {list(want)} "
                f"(ids is {list(shape)}: tokens, layers, top-k)"
            )
    if "top_k" in arrays and int(arrays["top_k"]) != shape[2]:
        raise TraceError(
            f"{source.path}: top_k is {arrays['top_k']}, but ids holds {shape[2]} a token"
        )
