"""Router logits as Hugging Face models give them (`output_router_logits`) and people save them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.families import WEIGHT_RULES
from moeroute.foreign import NPZ, SAFETENSORS, TORCH, Source
from moeroute.importers.arrays import archive
from moeroute.importers.findings import Findings
from moeroute.importers.recording import (
    CHUNK_ROWS,
    PLACE,
    Columns,
    Facts,
    ImportOptions,
    Recording,
)
from moeroute.importers.torchfile import Tensors, as_array, load_torch
from moeroute.schema import TraceError
from moeroute.weight_rules import WeightRule, weights_by

Logits = NDArray[Any]
_LAYER = re.compile(r"^(?:router_logits[._])?(?:layers?[._])?(\d+)$")
_LARGEST = float(np.finfo(np.float16).max)
_PROBABILITY_TOLERANCE = 0.02  # of probabilities in bfloat16


@dataclass
class _Pass:
    """The logits of one forward pass: tokens, layers, experts, and rows start..stop-1 of them."""

    shape: tuple[int, int, int]
    rows: Callable[[int, int], Logits]


def detect(source: Source) -> bool:
    """Whether the file holds nothing but a layer's logits each, or an array router_logits."""
    if source.kind == NPZ:
        with archive(source) as arrays:
            return "router_logits" in arrays.names and "ids" not in arrays.names
    if source.kind == SAFETENSORS:
        names = Tensors(source).names
        return names == ["router_logits"] or (bool(names) and all(map(_LAYER.match, names)))
    if source.kind != TORCH:
        return False
    return bool(_tensors(load_torch(source)))


def read(source: Source, options: ImportOptions) -> Recording:
    """Read router logits: a tensor [tokens, experts] a layer, or one [tokens, layers, experts].

    What `generate` returns, a tuple of layers for each forward pass, is read, too. `options.top_k`
    says how many experts a token chooses: those of the largest logits. Weights need
    `options.weight_rule`. Raises TraceError without top_k, and naming a tensor that is wrong.
    """
    if options.top_k is None:
        raise TraceError(
            f"{source.path}: logits do not tell how many experts a token chooses: give --top-k, or "
            "--like MODEL"
        )
    if options.weight_rule not in (None, *WEIGHT_RULES):
        raise TraceError(
            f"weight rule {options.weight_rule!r}: there are {', '.join(WEIGHT_RULES)}"
        )
    passes = list(_passes(source))
    findings = Findings()
    _, n_layers, n_experts = passes[0].shape
    for number, one in enumerate(passes):
        if one.shape[1:] != (n_layers, n_experts):
            raise TraceError(
                f"{source.path}: forward pass {number} is of {one.shape[1]} layers of "
                f"{one.shape[2]} experts, the first of {n_layers} of {n_experts}"
            )
    if not 1 <= options.top_k <= n_experts:
        raise TraceError(f"{source.path}: top-{options.top_k} of {n_experts} experts cannot be")
    findings.note("experts", f"those of the {options.top_k} largest logits")
    facts = Facts(source.path.name.rsplit(".", 1)[0], n_layers=n_layers, n_experts=n_experts)
    facts.phase = "logits do not tell phases: --prompt-tokens says them"
    facts.weight_rule = options.weight_rule
    facts.weight_scale = 1.0 if options.weight_rule else None
    return Recording(
        source.path,
        facts,
        _chunks(source, passes, options, findings),
        lambda place: f"token {place // n_layers}, layer {place % n_layers}",
        findings,
    )


def _passes(source: Source) -> Iterator[_Pass]:
    if source.kind == NPZ:
        yield _of_npz(source)
    elif source.kind == SAFETENSORS:
        yield _of_safetensors(source)
    else:
        found = _tensors(load_torch(source))
        if not found:
            raise TraceError(f"{source.path}: no tensors [tokens, experts], one a layer")
        for layers in found:
            yield _of_layers(source, layers)


def _of_npz(source: Source) -> _Pass:
    with archive(source) as arrays:
        shape, kind = arrays["router_logits"].shape, arrays["router_logits"].dtype.kind
    if len(shape) != 3 or kind != "f" or 0 in shape:
        raise TraceError(
            f"{source.path}: array router_logits is {list(shape)}, not real numbers [tokens, "
            "layers, experts]"
        )
    parts: Iterator[Logits] = iter(())

    def in_order(n: int) -> Iterator[Logits]:
        with archive(source) as arrays:
            yield from arrays["router_logits"].rows(n)

    def rows(start: int, stop: int) -> Logits:
        """An archive is read from its beginning to its end, as these are asked for."""
        nonlocal parts
        if start == 0:
            parts = in_order(stop)
        return next(parts)

    return _Pass(shape, rows)


def _of_safetensors(source: Source) -> _Pass:
    tensors = Tensors(source)
    if tensors.names == ["router_logits"]:
        shape = tensors.shape("router_logits")
        if len(shape) != 3:
            raise TraceError(
                f"{source.path}: tensor router_logits is {list(shape)}, not [tokens, layers, "
                "experts]"
            )
        return _Pass(shape, lambda a, b: tensors.rows("router_logits", a, b))
    numbered = sorted(
        (int(m.group(1)), name) for name in tensors.names if (m := _LAYER.match(name))
    )
    names = [name for _, name in numbered]
    shapes = {tensors.shape(name) for name in names}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        raise TraceError(f"{source.path}: the layers' tensors are not all of one [tokens, experts]")

    def rows(start: int, stop: int) -> Logits:
        return np.stack([tensors.rows(name, start, stop) for name in names], axis=1)

    return _Pass((shape[0], len(names), shape[1]), rows)


def _tensors(found: Any) -> list[list[Any]]:
    """The layers' tensors of each forward pass; empty where the object is no such thing."""
    if isinstance(found, dict):
        found = found.get("router_logits")
    if as_array(found) is not None:
        whole = found.detach()
        return [[whole[:, layer] for layer in range(whole.shape[1])]] if whole.ndim == 3 else []
    if not isinstance(found, (list, tuple)) or not found:
        return []
    passes = found if isinstance(found[0], (list, tuple)) else [found]
    good = all(
        isinstance(layers, (list, tuple))
        and layers
        and all(as_array(t[:0] if getattr(t, "ndim", 0) else None) is not None for t in layers)
        for layers in passes
    )
    return [list(layers) for layers in passes] if good else []


def _of_layers(source: Source, layers: list[Any]) -> _Pass:
    shapes = {tuple(tensor.shape) for tensor in layers}
    if len(shapes) != 1 or len(shape := shapes.pop()) not in (2, 3):
        raise TraceError(f"{source.path}: the layers' tensors are not all of one [tokens, experts]")
    flat = [tensor.reshape(-1, shape[-1]) for tensor in layers]

    def rows(start: int, stop: int) -> Logits:
        parts = [as_array(tensor[start:stop]) for tensor in flat]
        return np.stack([part for part in parts if part is not None], axis=1)

    return _Pass((len(flat[0]), len(layers), shape[-1]), rows)


def _chunks(
    source: Source, passes: list[_Pass], options: ImportOptions, findings: Findings
) -> Iterator[Columns]:
    first, probabilities = 0, False
    for number, one in enumerate(passes):
        tokens, n_layers, n_experts = one.shape
        size = max(1, CHUNK_ROWS // n_layers)
        for start in range(0, tokens, size):
            values = one.rows(start, min(start + size, tokens)).astype(np.float32)
            if not number and not start:
                probabilities = _are_probabilities(values)
                if probabilities:
                    findings.note("logits", "were probabilities: their logarithms are kept")
            if probabilities:
                with np.errstate(divide="ignore"):
                    values = np.maximum(np.log(values), np.finfo(np.float16).min)
            columns = _rows(source, values.reshape(-1, n_experts), options, first * n_layers)
            n = len(values)
            columns |= {
                "position": np.repeat(np.arange(first, first + n), n_layers),
                "sequence": np.zeros(n * n_layers, np.uint32),
                "layer": np.tile(np.arange(n_layers, dtype=np.uint16), n),
            }
            if len(passes) > 1:
                columns["pass_id"] = np.full(n * n_layers, number)
            yield columns
            first += n


def _are_probabilities(values: Logits) -> bool:
    return bool(
        (values >= 0).all() and (np.abs(values.sum(axis=-1) - 1) < _PROBABILITY_TOLERANCE).all()
    )


def _rows(source: Source, values: Logits, options: ImportOptions, first: int) -> Columns:
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise TraceError(f"{source.path}: row {first + at}, column router_logits: there is a NaN")
    assert options.top_k is not None
    experts = np.argsort(-values, axis=1, kind="stable")[:, : options.top_k]
    columns: Columns = {
        "experts": experts,
        "router_logits": np.clip(values, -_LARGEST, _LARGEST).astype(np.float16),
        PLACE: np.arange(first, first + len(values)),
    }
    if options.weight_rule is not None:
        columns["weights"] = weights_by(WeightRule(options.weight_rule), values, experts)
    return columns
