"""moe-cache-eval's folder: a manifest, and events of (request, forward pass, layer) as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import FOLDER, MANIFEST, SAFETENSORS, Source
from moeroute.importers.chunks import gathered
from moeroute.importers.findings import Findings
from moeroute.importers.recording import PLACE, Columns, Facts, ImportOptions, Recording, fit
from moeroute.importers.torchfile import Tensors
from moeroute.jsontext import parse_json
from moeroute.schema import TraceError

_PER_EVENT = (
    *("scheduler_steps", "forward_cycles"),
    *("request_indices", "phases", "layer_ids", "token_counts"),
)
_PER_EXPERT = ("expert_ids", "assignment_counts")
_MOST = 1 << 16


def detect(source: Source) -> bool:
    """Whether the manifest of the folder names events."""
    if source.kind != FOLDER:
        return False
    found = _manifest(source).get("artifacts")
    return isinstance(found, dict) and "events" in found


def read(source: Source, _options: ImportOptions) -> Recording:
    """Read the events: the union of experts of one layer in one forward pass, with their counts.

    Which token of a pass of several chose which expert is not recorded. The counts are shared out
    so that each token has as many distinct experts, and the pass's union and counts are right.
    Raises TraceError naming the file, the tensor and the event.
    """
    if not detect(source):
        raise TraceError(f"{source.path}: no folder whose {MANIFEST} names artifacts.events")
    manifest = _manifest(source)
    events = Source(_events_path(source, manifest))
    if events.kind != SAFETENSORS:
        raise TraceError(f"{events.path}: {events.described}, not safetensors")
    tensors = Tensors(events)
    arrays = _arrays(events, tensors)
    findings = Findings()
    findings.note(
        "tokens",
        "which token of a pass of several chose which expert is not recorded: shared out so that "
        "the pass's experts and counts are right",
    )
    facts = Facts(source.path.name)
    model = manifest.get("model")
    if isinstance(model, dict):
        for name, key in (("n_layers", "num_layers"), ("n_experts", "num_experts")):
            if key in model:
                at = f"{MANIFEST}, field model.{key}"
                setattr(facts, name, fit(source.path, at, model[key], 1, _MOST))
        if isinstance(model.get("name"), str):
            facts.model = model["name"]
    chunks = gathered(_chunks(events, arrays))
    return Recording(source.path, facts, chunks, "event {}".format, findings)


def _manifest(source: Source) -> dict[str, Any]:
    path = source.path / MANIFEST
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise TraceError(f"{path}: is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise TraceError(f"{path}: is not a JSON object")
    return found


def _events_path(source: Source, manifest: dict[str, Any]) -> Any:
    entry = manifest["artifacts"]["events"]
    name = entry.get("path") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        raise TraceError(f"{source.path / MANIFEST}: artifacts.events does not say its path")
    path = source.path / name
    if not path.resolve().is_relative_to(source.path.resolve()):
        raise TraceError(f"{source.path / MANIFEST}: artifacts.events leads out of the folder")
    return path


def _arrays(events: Source, tensors: Tensors) -> dict[str, NDArray[Any]]:
    wanted = (*_PER_EVENT, "offsets", *_PER_EXPERT)
    if absent := [name for name in wanted if name not in tensors.names]:
        raise TraceError(
            f"{events.path}: no tensor {absent[0]}; it has {', '.join(tensors.names) or 'none'}"
        )
    names = (*wanted, *(n for n in ("gate_mass",) if n in tensors.names))
    arrays = {name: tensors[name] for name in names}
    n, offsets = len(arrays["layer_ids"]), arrays["offsets"]
    lengths = {name: len(arrays["layer_ids"]) for name in _PER_EVENT} | {"offsets": n + 1}
    total = int(offsets[-1]) if offsets.ndim == 1 and len(offsets) else -1
    lengths |= {name: total for name in names if name not in lengths}
    for name, length in lengths.items():
        whole = arrays[name].dtype.kind in "iu" or name == "gate_mass"
        if arrays[name].shape != (length,) or not whole:
            found = arrays[name]
            raise TraceError(
                f"{events.path}: tensor {name} is {found.dtype}{list(found.shape)}, not [{length}]"
            )
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise TraceError(f"{events.path}: tensor offsets does not rise from 0")
    return arrays


def _chunks(events: Source, arrays: dict[str, NDArray[Any]]) -> Iterator[Columns]:
    offsets = arrays["offsets"]
    _, passes = np.unique(
        np.stack([arrays[name] for name in ("scheduler_steps", "forward_cycles")]),
        axis=1,
        return_inverse=True,
    )
    first_of: dict[tuple[int, int], tuple[int, int]] = {}  # first position and tokens of a pass
    next_of: dict[int, int] = {}
    for event in range(len(arrays["layer_ids"])):
        request, phase, layer, tokens = (int(arrays[n][event]) for n in _PER_EVENT[2:])
        cycle = int(passes[event])
        cut = slice(int(offsets[event]), int(offsets[event + 1]))
        uses = arrays["assignment_counts"][cut].astype(np.int64)
        at = f"{events.path}: event {event}"
        if tokens < 1 or (uses < 1).any() or (uses > tokens).any():
            raise TraceError(f"{at}: counts {uses.tolist()[:8]} of {tokens} tokens cannot be")
        if (request, cycle) not in first_of:
            first_of[request, cycle] = next_of.get(request, 0), tokens
            next_of[request] = next_of.get(request, 0) + tokens
        first, known = first_of[request, cycle]
        if known != tokens:
            raise TraceError(f"{at}: {tokens} tokens, where the pass's other layers have {known}")
        yield {
            "sequence": np.full(tokens, request),
            "position": first + np.arange(tokens),
            "phase": np.full(tokens, phase),
            "layer": np.full(tokens, layer),
            "pass_id": np.full(tokens, cycle),
            PLACE: np.full(tokens, event),
            **_shared_out(arrays, cut, uses, tokens),
        }


def _shared_out(
    arrays: dict[str, NDArray[Any]], cut: slice, uses: NDArray[np.int64], tokens: int
) -> Columns:
    """An event's experts over its tokens: an expert used n times goes to the next n tokens."""
    experts = np.repeat(arrays["expert_ids"][cut], uses)
    width = -(-len(experts) // tokens)
    found = np.full((max(1, width), tokens), -1, np.int64)
    found.ravel()[: len(experts)] = experts
    columns: Columns = {"experts": found.T}
    if "gate_mass" in arrays:
        weights = np.zeros(found.shape, np.float32)
        weights.ravel()[: len(experts)] = np.repeat(arrays["gate_mass"][cut] / uses, uses)
        columns["weights"] = weights.T
    return columns
