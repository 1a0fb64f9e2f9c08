"""SGLang's expert distribution recorder, mode per_token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import TORCH, Source
from moeroute.importers.chunks import gathered
from moeroute.importers.findings import Findings
from moeroute.importers.npz import by_layer
from moeroute.importers.recording import Columns, Facts, ImportOptions, Recording
from moeroute.importers.torchfile import as_array, load_torch
from moeroute.schema import DECODE, PROMPT, TraceError

_IDS = "topk_ids_of_layer"
_MAP = "last_physical_to_logical_map"
_DECODE_MODE = 2  # sglang.srt.model_executor.forward_batch_info.ForwardMode


def detect(source: Source) -> bool:
    """Whether the file is a PyTorch file whose records have each token's experts."""
    if source.kind != TORCH:
        return False
    found = load_torch(source)
    records = found.get("records") if isinstance(found, dict) else None
    return isinstance(records, list) and any(isinstance(r, dict) and _IDS in r for r in records)


def read(source: Source, _options: ImportOptions) -> Recording:
    """Read the records of a per_token recording: each is one forward pass.

    Requests are told apart by their positions: the recorder keeps no names. Ids are physical
    experts; the recorded map makes logical ones of them. Raises TraceError naming the record and
    the field that is missing or wrong.
    """
    found = load_torch(source)
    findings = Findings()
    facts = Facts(source.path.name.split(".pt")[0])
    records = found.get("records") if isinstance(found, dict) else None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise TraceError(f"{source.path}: no list of records")
    replicas = _replicas(source, found.get(_MAP), facts, findings)
    reader = _Reader(source, records, replicas, findings)
    return Recording(source.path, facts, gathered(reader.chunks()), reader.place, findings)


def _replicas(
    source: Source, found: Any, facts: Facts, findings: Findings
) -> NDArray[np.int64] | None:
    """The map from physical to logical experts [L, P]; None where it maps each to itself."""
    table = as_array(found)
    if table is None:
        return None
    if table.ndim != 2 or table.dtype.kind not in "iu" or (table < 0).any():
        raise TraceError(f"{source.path}: {_MAP} is {table.dtype}{list(table.shape)}, not a table")
    facts.n_experts = int(table.max()) + 1
    if (table == np.arange(table.shape[1])).all():
        return None
    n_physical = table.shape[1]
    findings.note(
        "replicas",
        f"{n_physical} physical experts a layer hold {facts.n_experts} logical ones: ids are "
        "logical now, by the last map of the recording",
    )
    facts.physical_to_logical = table.tolist()
    return table.astype(np.int64)


class _Reader:
    """Goes through the records, following each request from pass to pass."""

    def __init__(
        self,
        source: Source,
        records: list[dict[str, Any]],
        replicas: NDArray[np.int64] | None,
        findings: Findings,
    ) -> None:
        self.source, self.records = source, records
        self.replicas, self.findings = replicas, findings
        self.unclear = 0
        self._n_sequences = 0
        self._next: dict[int, deque[int]] = {}  # the sequences whose next position is this one
        self._at: list[tuple[int, int]] = []  # first place of each record

    def place(self, row: int) -> str:
        """The record of a row."""
        number = next((n for first, n in reversed(self._at) if first <= row), 0)
        return f"record {number}"

    def chunks(self) -> Iterator[Columns]:
        """A record's tokens at a time."""
        start = 0
        for number, record in enumerate(self.records):
            ids = self._ids(number, record)
            tokens, n_layers, _ = ids.shape
            if not tokens:
                continue
            self._at.append((start * n_layers, number))
            positions = self._list(number, record, "positions", tokens)
            decode = record.get("forward_mode") == _DECODE_MODE
            sequences = self._sequences(number, record, positions, decode)
            inputs = record.get("input_ids")
            columns = {
                "position": positions,
                "sequence": sequences,
                "pass_id": np.full(tokens, number),
                "phase": np.full(tokens, DECODE if decode else PROMPT),
            }
            if inputs is not None:
                columns["token_id"] = self._list(number, record, "input_ids", tokens)
            yield by_layer(ids, start, **columns)
            start += tokens
        self.findings.note("sequences", "requests are told apart by their positions")
        self.findings.count(
            "sequences", self.unclear, "tokens could have been several requests' next"
        )

    def _ids(self, number: int, record: dict[str, Any]) -> NDArray[Any]:
        """[tokens, layers, top-k] logical ids; below 0 none."""
        found = as_array(record.get(_IDS))
        if found is None or found.ndim != 3 or found.dtype.kind not in "iu":
            raise TraceError(
                f"{self.source.path}: record {number}: {_IDS} is no tensor of whole numbers "
                "[layers, tokens, top-k]"
            )
        if self.replicas is not None:
            n_layers, n_physical = self.replicas.shape
            if len(found) != n_layers or found.max(initial=-1) >= n_physical:
                raise TraceError(
                    f"{self.source.path}: record {number}: {_IDS} {list(found.shape)} has ids up "
                    f"to {found.max(initial=-1)}, and {_MAP} is {list(self.replicas.shape)}"
                )
            layer = np.arange(n_layers)[:, None, None]
            found = np.where(found < 0, -1, self.replicas[layer, np.maximum(found, 0)])
        return found.transpose(1, 0, 2)

    def _list(self, number: int, record: dict[str, Any], name: str, n: int) -> NDArray[Any]:
        values = record.get(name)
        tensor = as_array(values)
        try:
            found = np.array(values) if tensor is None else tensor
        except ValueError:  # lists of several lengths, or nested too deep
            found = np.array(None)
        if found.shape != (n,) or found.dtype.kind not in "iu":
            raise TraceError(
                f"{self.source.path}: record {number}: {name} is not {n} whole numbers, one a token"
            )
        return found

    def _sequences(
        self, number: int, record: dict[str, Any], positions: NDArray[Any], decode: bool
    ) -> NDArray[np.int64]:
        """The request of each token of a pass, and what each request's next position is."""
        lengths = record.get("extend_seq_lens")
        ends = [1] * len(positions) if decode or lengths is None else list(lengths)
        if sum(ends) != len(positions):
            raise TraceError(
                f"{self.source.path}: record {number}: extend_seq_lens add up to {sum(ends)}, and "
                f"there are {len(positions)} tokens"
            )
        if not decode and lengths is None:  # one request, or several that positions tell apart
            ends = np.diff(
                [0, *(np.flatnonzero(np.diff(positions) != 1) + 1), len(positions)]
            ).tolist()
        found = np.empty(len(positions), np.int64)
        first, after = 0, []
        for n in ends:
            sequence = self._sequence_at(int(positions[first]))
            found[first : first + n] = sequence
            after.append((int(positions[first + n - 1]) + 1, sequence))
            first += n
        for position, sequence in after:
            self._next.setdefault(position, deque()).append(sequence)
        return found

    def _sequence_at(self, position: int) -> int:
        waiting = self._next.get(position) if position else None
        if waiting:
            self.unclear += len(waiting) > 1
            return waiting.popleft()
        self._n_sequences += 1
        return self._n_sequences - 1
