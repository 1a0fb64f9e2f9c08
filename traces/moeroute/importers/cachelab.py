"""moe-cache-lab's routing JSON lines, versions 1 and 2."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeroute.foreign import Source
from moeroute.importers.jsonlines import Layout, Reader
from moeroute.importers.recording import Columns, Facts, ImportOptions, Recording, fit
from moeroute.importers.records import Record, first_record
from moeroute.schema import TraceError

_FORMAT = "moe-cache-lab.routing-jsonl"
_VERSIONS = (1, 2)
_DECODER_LAYERS = 1 << 15  # added to a decoder's layers where there is an encoder: numbered anew
_MOST_EXPERTS = 1 << 16
_FIELDS = {
    **{"layer": "layer", "position": "token_position", "experts": "selected_experts"},
    **{"weights": "selected_probabilities", "phase": "phase"},
}
_LAYOUT = Layout("moe-cache-lab", "moe-cache-lab routing JSON lines", fields=_FIELDS)


def detect(source: Source) -> bool:
    """Whether the first line's format is moe-cache-lab's."""
    first = first_record(source)
    return first is not None and first.get("format") == _FORMAT


def read(source: Source, options: ImportOptions) -> Recording:
    """Read a file of moe-cache-lab.

    A token that was assigned to no expert (its capacity was used up) has no row. Layers of an
    encoder come before those of the decoder. Raises TraceError naming the line.
    """
    facts = Facts(source.path.name.split(".json")[0])
    reader = _CacheLab(source, _LAYOUT, options, facts)
    return Recording(source.path, facts, reader.chunks(), "line {}".format, reader.findings)


class _CacheLab(Reader):
    """Its lines, after one of metadata."""

    def __init__(
        self, source: Source, layout: Layout, options: ImportOptions, facts: Facts
    ) -> None:
        super().__init__(source, layout, options, facts)
        self._two_stages = False
        self._encoded = 0  # positions that an encoder has taken

    def _take_header(self, first: Record) -> bool:
        path, version = self.source.path, first.get("format_version")
        if version not in _VERSIONS:
            raise TraceError(f"{path}: line 1: format_version is {version!r}, not 1 or 2")
        if isinstance(first.get("model_id"), str):
            self.facts.model = first["model_id"]
        if isinstance(first.get("model_revision"), str):
            self.facts.revision = first["model_revision"]
        stages = first.get("routing_stages") if version == 2 else [first]
        if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
            raise TraceError(f"{path}: line 1, field routing_stages: is no list of objects")
        experts = [
            fit(path, "line 1, field num_experts", stage.get("num_experts", 0), 1, _MOST_EXPERTS)
            for stage in stages
        ]
        self.facts.n_experts = max(experts)
        self._two_stages = len(stages) > 1
        return True

    def _columns(self, numbers: list[int], found: list[Record]) -> Columns:
        odd = next(
            (i for i, r in enumerate(found) if r.get("record_type") != "routing_selection"), None
        )
        if odd is not None:
            kind: Any = found[odd].get("record_type")
            raise TraceError(
                f"{self.source.path}: line {numbers[odd]}: record_type is {kind!r}, not "
                "'routing_selection'"
            )
        columns = super()._columns(numbers, found)
        if self._two_stages:
            decoder = np.array([one.get("routing_stage") == "decoder" for one in found])
            encoder = columns["position"][~decoder]
            self._encoded = max(self._encoded, int(encoder.max(initial=-1)) + 1)
            columns["layer"] = columns["layer"] + _DECODER_LAYERS * decoder
            columns["position"] = columns["position"] + self._encoded * decoder
            columns["sequence"] = np.zeros(len(found), np.uint32)
        return columns
