"""What llama.cpp's trace tools write: three CSV layouts and a binary one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import BINARY, TEXT, Source
from moeroute.importers.chunks import gathered
from moeroute.importers.fields import PHASE_WORDS
from moeroute.importers.findings import Findings
from moeroute.importers.recording import PLACE, Columns, Facts, ImportOptions, Recording
from moeroute.importers.table import Kind, table_blocks
from moeroute.schema import DECODE, PROMPT, TraceError

if TYPE_CHECKING:
    import polars as pl

_TOKENS = "phase,token,layer,rank,expert"
_USES = "layer,expert"
_LAYERS, _IDS, _U32 = (1 << 16) - 1, (1 << 16) - 2, (1 << 32) - 1
_POSITIONS = range(-(1 << 31), 1 << 31)
_HEAD = struct.Struct("<3i")
_MOST_K = 1 << 10


def _header(source: Source) -> list[str]:
    if source.kind != TEXT:
        return []
    return [name.strip().lower() for name in source.first_line.split(",")]


def detect_tokens(source: Source) -> bool:
    """Whether the first line names the columns phase, token, layer, rank, expert."""
    return set(_TOKENS.split(",")) <= set(_header(source))


def detect_positions(source: Source) -> bool:
    """Whether the text is `pos,layer,id0,id1,...`, with or without these names."""
    names = _header(source)
    if names[:2] == ["pos", "layer"]:
        return len(names) > 2
    return len(names) > 2 and all(name.lstrip("-").isdecimal() for name in names)


def detect_uses(source: Source) -> bool:
    """Whether the first line is `layer,expert`."""
    return _header(source) == _USES.split(",")


def detect_binary(source: Source) -> bool:
    """Whether the file begins with a layer, a number of tokens and a top-k that fit its size."""
    if source.kind != BINARY or len(source.start) < _HEAD.size:
        return False
    layer, tokens, top_k = _HEAD.unpack(source.start[: _HEAD.size])
    good = 0 <= layer <= _LAYERS and tokens > 0 and 0 < top_k <= _MOST_K
    with source.open() as file:
        size: int = file.seek(0, 2)
    return bool(good and size >= _HEAD.size + 4 * tokens * top_k)


def read_tokens(source: Source, _options: ImportOptions) -> Recording:
    """Read `phase,token,layer,rank,expert`: a line an expert, the heaviest of rank 0.

    Raises TraceError naming line and column.
    """
    findings = Findings()
    kinds: dict[str, Kind] = {
        "phase": str,
        "token": _U32,
        "layer": _LAYERS,
        "rank": _MOST_K,
        "expert": _IDS,
    }

    def chunks() -> Iterator[Columns]:
        left: pl.DataFrame | None = None
        for table in table_blocks(source, kinds, findings):
            block = table if left is None else left.vstack(table)
            # The last (token, layer) may go on in the next block.
            last = block.select("token", "layer").row(-1)
            same = ((block["token"] == last[0]) & (block["layer"] == last[1])).to_numpy()
            cut = len(same) - int(np.argmin(same[::-1])) if not same.all() else 0
            left = block[cut:]
            if cut:
                yield _ranked(source, block[:cut])
        if left is not None and len(left):
            yield _ranked(source, left)

    facts = Facts(source.path.name.split(".csv")[0])
    return Recording(source.path, facts, chunks(), "line {}".format, findings)


def _ranked(source: Source, table: pl.DataFrame) -> Columns:
    """Lines of one expert each as rows of a (token, layer)."""
    column = {name: table[name].to_numpy() for name in table.columns if name != "phase"}
    rank = column["rank"]
    heads = np.flatnonzero(rank == 0)
    lengths = np.diff(np.append(heads, len(rank)))
    wrong = np.ones(len(rank), np.bool_)
    if rank[0] == 0:
        wrong = rank != np.arange(len(rank)) - np.repeat(heads, lengths)
    for name in ("token", "layer"):
        wrong[1:] |= (rank[1:] != 0) & (np.diff(column[name]) != 0)
    if wrong.any():
        raise TraceError(
            f"{source.path}: line {column['line'][int(wrong.argmax())]}, column rank: the ranks of "
            "a token's layer are not 0, 1, ... one after the other"
        )
    experts = np.full((len(heads), int(lengths.max())), -1, np.int32)
    experts[np.arange(experts.shape[1]) < lengths[:, None]] = column["expert"]
    words = table["phase"].gather(heads)
    odd = [i for i, word in enumerate(words) if word not in PHASE_WORDS]
    if odd:
        raise TraceError(
            f"{source.path}: line {column['line'][heads[odd[0]]]}, column phase: "
            f"{words[odd[0]]!r} is no phase"
        )
    return {
        "position": column["token"][heads],
        "layer": column["layer"][heads],
        "phase": np.array([PHASE_WORDS[word] for word in words], np.uint8),
        "experts": experts,
        PLACE: column["line"][heads],
    }


def read_positions(source: Source, _options: ImportOptions) -> Recording:
    """Read `pos,layer,id0,id1,...`: negative positions are the prompt, in the file's order.

    Raises TraceError naming line and column.
    """
    findings = Findings()
    names = source.first_line.split(",")
    named = names[0].strip().lower() == "pos"
    ids = [f"id{i}" for i in range(len(names) - 2)]
    header = None if named else ",".join(["pos", "layer", *ids])
    if named:
        ids = [name.strip().lower() for name in names[2:] if name.strip().lower().startswith("id")]
    if not ids:
        raise TraceError(f"{source.path}: no column id0; it has {', '.join(names)}")
    kinds: dict[str, Kind] = {"pos": _POSITIONS, "layer": _LAYERS}
    kinds |= dict.fromkeys(ids, range(-1, _IDS + 1))
    prompt = _Prompt()

    def chunks() -> Iterator[Columns]:
        for table in table_blocks(source, kinds, findings, header):
            raw = table["pos"].to_numpy()
            yield {
                "position": prompt.positions(raw),
                "phase": np.where(raw < 0, PROMPT, DECODE),
                "layer": table["layer"].to_numpy(),
                "experts": table.select(ids).to_numpy(),
                PLACE: table["line"].to_numpy(),
            }

    facts = Facts(source.path.name.split(".csv")[0])
    return Recording(source.path, facts, chunks(), "line {}".format, findings)


class _Prompt:
    """Positions of tokens whose prompt is numbered below 0: the prompt's in the order in which they
    come, then the decoded ones after them. A prompt after decoded tokens begins anew."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._decoding = False

    def positions(self, raw: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of the next rows."""
        found = np.empty_like(raw)
        decode = raw >= 0
        edges = [0, *(np.flatnonzero(decode[1:] != decode[:-1]) + 1).tolist(), len(raw)]
        for first, last in pairwise(edges):
            part = raw[first:last]
            if part[0] >= 0:
                found[first:last] = len(self._seen) + part
                self._decoding = True
                continue
            if self._decoding:
                self._seen, self._decoding = {}, False
            values, at, of = np.unique(part, return_index=True, return_inverse=True)
            for i in np.argsort(at):
                self._seen.setdefault(int(values[i]), len(self._seen))
            found[first:last] = np.array([self._seen[int(value)] for value in values])[of]
        return found


def read_uses(source: Source, options: ImportOptions) -> Recording:
    """Read `layer,expert`, which has lost where tokens end.

    The lines of one layer, one after the other, are what one forward pass chose there; each
    top-k of them are a token's. Raises TraceError naming the line where that does not come out.
    """
    findings = Findings()
    kinds = {"layer": _LAYERS, "expert": _IDS}

    def runs() -> Iterator[tuple[int, NDArray[Any], int]]:
        """Layer, experts and first line of each run of one layer's lines."""
        held: list[NDArray[Any]] = []
        layer, line = -1, 0
        for table in table_blocks(source, kinds, findings):
            layers, experts = table["layer"].to_numpy(), table["expert"].to_numpy()
            edges = [0, *(np.flatnonzero(np.diff(layers)) + 1).tolist(), len(layers)]
            for first, last in pairwise(edges):
                if held and layers[first] != layer:
                    yield layer, np.concatenate(held), line
                    held = []
                if not held:
                    layer, line = int(layers[first]), int(table["line"][first])
                held.append(experts[first:last])
        if held:
            yield layer, np.concatenate(held), line

    facts = Facts(source.path.name.split(".csv")[0])
    facts.phase = "the file has lost them"
    top_k = options.top_k
    if top_k is None:
        top_k = min((len(experts) for _, experts, _ in runs()), default=1)
        findings.note(
            "tokens",
            f"where tokens end is lost: top-{top_k} guessed from the shortest run of a layer's "
            "lines (--top-k says it)",
        )
    chunks = gathered(_of_runs(source, runs(), top_k))
    return Recording(source.path, facts, chunks, "line {}".format, findings)


def read_binary(source: Source, _options: ImportOptions) -> Recording:
    """Read records of layer, tokens, top-k and ids [tokens, top-k], all int32.

    Raises TraceError naming the record that is cut or wrong.
    """

    def runs() -> Iterator[tuple[int, NDArray[Any], int]]:
        with source.open() as file:
            size = file.seek(0, 2)
            file.seek(0)
            number = 0
            while head := file.read(_HEAD.size):
                at = f"{source.path}: record {number}"
                if len(head) < _HEAD.size:
                    raise TraceError(f"{at}: is cut")
                layer, tokens, top_k = _HEAD.unpack(head)
                if not (0 <= layer <= _LAYERS and tokens > 0 and 0 < top_k <= _MOST_K):
                    raise TraceError(f"{at}: layer {layer}, {tokens} tokens, top-{top_k} cannot be")
                n_bytes = 4 * tokens * top_k
                if n_bytes > (left := size - file.tell()):
                    raise TraceError(f"{at}: is cut: {left} of {n_bytes} bytes")
                data = file.read(n_bytes)
                yield layer, np.frombuffer(data, "<i4").reshape(tokens, top_k), number
                number += 1

    facts = Facts(source.path.name.split(".bin")[0])
    chunks = gathered(_of_runs(source, runs(), None))
    return Recording(source.path, facts, chunks, "record {}".format, Findings())


def _of_runs(
    source: Source, runs: Iterator[tuple[int, NDArray[Any], int]], top_k: int | None
) -> Iterator[Columns]:
    """A layer's experts of one forward pass at a time; a pass ends where layers begin anew."""
    last, number, first, in_pass = -1, -1, 0, 0
    for layer, chosen, place in runs:
        if top_k is not None and len(chosen) % top_k:
            raise TraceError(
                f"{source.path}: line {place}: {len(chosen)} lines of layer {layer} are no "
                f"multiple of top-{top_k}"
            )
        experts = chosen if top_k is None else chosen.reshape(-1, top_k)
        tokens = len(experts)
        if number < 0 or layer <= last:
            number, first, in_pass = number + 1, first + in_pass, tokens
        elif tokens != in_pass:
            raise TraceError(
                f"{source.path}: {'line' if top_k else 'record'} {place}: {tokens} tokens in layer "
                f"{layer}, where the pass's layer before has {in_pass}"
            )
        last = layer
        yield {
            "layer": np.full(tokens, layer),
            "position": first + np.arange(tokens),
            "sequence": np.zeros(tokens, np.uint32),
            "pass_id": np.full(tokens, number),
            "experts": experts,
            PLACE: np.full(tokens, place),
        }
