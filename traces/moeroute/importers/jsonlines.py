"""JSON lines with a (token, layer) each, or a layer's tokens of one forward pass each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moeroute.importers.fields as of
from moeroute.foreign import Source
from moeroute.importers.chunks import joined
from moeroute.importers.findings import Findings
from moeroute.importers.recording import (
    PLACE,
    Columns,
    Facts,
    ImportOptions,
    Recording,
    fit,
)
from moeroute.importers.records import Record, document, first_record, is_document, records
from moeroute.schema import TraceError

_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """One recorder's JSON lines.

    marks    fields of the first line by which the layout is told
    fields   where the fields of each column are; the others are looked for by `fields.NAMES`
    header   the first line describes the model: the fields that say the model's name, its layers,
             experts and top-k
    skip     a field, and the value that lines of the model's own layers have there
    """

    name: str
    title: str
    marks: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
    header: tuple[str, str, str, str] | None = None
    skip: tuple[str, str] | None = None

    def detect(self, source: Source) -> bool:
        """Whether the text's first line has the layout's marks."""
        first = first_record(source)
        if first is None:
            return False
        if self.marks:
            return set(self.marks) <= first.keys()
        return set(of.REQUIRED_FIELDS) <= of.choose(first, {}).keys()

    def read(self, source: Source, options: ImportOptions) -> Recording:
        """Read JSON lines of this layout.

        Raises TraceError naming the line and the field that is missing or wrong.
        """
        of.check_map(options.fields)
        name = source.path.name.split(".json")[0]
        reader = Reader(source, self, options, Facts(name))
        return Recording(
            source.path, reader.facts, reader.chunks(), lambda i: f"line {i}", reader.findings
        )


GENERIC = Layout("jsonl", "JSON lines with fields for layer, token, experts, weights (--map)")
LAYOUTS = (
    Layout(
        "moe-policylang",
        "moe-policylang JSON lines",
        ("num_layers", "num_experts", "top_k"),
        {
            **{"sequence": "p", "position": "t", "layer": "l", "experts": "e"},
            **{"weights": "s", "phase": "ph"},
        },
        header=("model_name", "num_layers", "num_experts", "top_k"),
    ),
    Layout(
        "megatron",
        "Megatron-LM's --moe-routing-trace-path (JSON lines)",
        ("step", "layer", "top_indices"),
        {"pass_id": "step", "experts": "top_indices"},
        skip=("block", "decoder"),
    ),
    Layout(
        "moe-balance",
        "moe-balance routing trace (JSON lines)",
        ("layer", "batch_id", "topk_experts"),
        {"pass_id": "batch_id", "experts": "topk_experts", "weights": "topk_weights"},
    ),
    GENERIC,
)


class Reader:
    """Reads a file's lines into chunks, remembering what goes from one line to the next."""

    def __init__(
        self, source: Source, layout: Layout, options: ImportOptions, facts: Facts
    ) -> None:
        self.source, self.layout, self.facts = source, layout, facts
        self.given = layout.fields | options.fields
        self.findings = Findings()
        self.fields: dict[str, str] = {}
        self.skipped = 0
        self._sequences: dict[Any, int] = {}
        self._passes: dict[int, tuple[int, int]] = {}  # first position and tokens of each
        self._tokens = 0
        self._pass = -1
        self._layer = math.inf

    def chunks(self) -> Iterator[Columns]:
        """The file's rows, some lines at a time."""
        begun = False
        for block in records(self.source):
            numbers, found = block
            if not begun and self._take_header(found[0]):
                numbers, found = numbers[1:], found[1:]
            begun = True
            numbers, found = self._without_others(numbers, found)
            if found:
                yield self._columns(numbers, found)
        self.findings.count(
            "other_blocks", self.skipped, "lines of other blocks than the model's own: left out"
        )

    def _take_header(self, first: Record) -> bool:
        if self.layout.header is None:
            return False
        name, *numbers = self.layout.header
        if not set(numbers) <= first.keys():
            return False
        path = self.source.path
        for attribute, key in zip(("n_layers", "n_experts", "top_k"), numbers, strict=True):
            value = fit(path, f"line 1, field {key}", first[key], 1, _MOST_EXPERTS)
            setattr(self.facts, attribute, value)
        if isinstance(first.get(name), str):
            self.facts.model = first[name]
        return True

    def _without_others(
        self, numbers: list[int], found: list[Record]
    ) -> tuple[list[int], list[Record]]:
        if self.layout.skip is None:
            return numbers, found
        name, own = self.layout.skip
        kept = [
            (i, one) for i, one in zip(numbers, found, strict=True) if one.get(name, own) == own
        ]
        self.skipped += len(found) - len(kept)
        return [i for i, _ in kept], [one for _, one in kept]

    def _columns(self, numbers: list[int], found: list[Record]) -> Columns:
        if not self.fields:
            self._choose_fields(found[0])
        values = {}
        for column, path in self.fields.items():
            taken = self._take(path, numbers, found, column in of.REQUIRED_FIELDS)
            if taken is not None:
                values[column] = taken
        first = values["experts"][0]
        if type(first) is list and first and type(first[0]) is list:
            return self._of_passes(numbers, values)
        return self._of_rows(numbers, values)

    def _choose_fields(self, first: Record) -> None:
        self.fields = of.choose(first, self.given)
        for column in of.REQUIRED_FIELDS:
            if column not in self.fields:
                raise TraceError(
                    f"{self.source.path}: no field for {column} among {', '.join(first)}: name it "
                    f"with --map {column}=FIELD"
                )
        used = {path.split(".")[0] for path in self.fields.values()}
        if others := [name for name in first if name not in used]:
            self.findings.note("not_imported", "fields " + ", ".join(others))

    def _take(
        self, path: str, numbers: list[int], found: list[Record], required: bool
    ) -> list[Any] | None:
        """A field of all lines; None where a line lacks one that need not be there."""
        steps = path.split(".")
        try:
            if len(steps) == 1:
                return [one[path] for one in found]
            return [of.at_path(one, steps) for one in found]
        except KeyError:
            if not required:
                return None
        for number, one in zip(numbers, found, strict=True):
            try:
                of.at_path(one, steps)
            except KeyError:
                raise TraceError(
                    f"{self.source.path}: line {number}: no field {path}; it has {', '.join(one)}"
                ) from None
        raise AssertionError(path)

    def _line(self, numbers: list[int], i: int) -> str:
        return f"{self.source.path}: line {numbers[i]}"

    def _of_rows(self, numbers: list[int], values: dict[str, list[Any]]) -> Columns:
        """Lines of one (token, layer) each."""
        where = partial(self._line, numbers)
        columns: Columns = {PLACE: np.array(numbers)}
        lengths = {}
        for name, taken in values.items():
            if name in of.LISTS:
                columns[name], lengths[name] = of.lists(name, taken, where)
            elif name == "phase":
                columns[name] = of.phases(taken, where)
            elif name == "sequence":
                columns[name] = self._sequence(taken)
            else:
                columns[name] = of.scalars(name, taken, where)
        if "weights" in lengths and not lengths["weights"].any():
            del columns["weights"]  # a recorder that kept none
        elif "weights" in lengths:
            of.check_lengths(lengths["experts"], lengths["weights"], where)
        return columns

    def _sequence(self, taken: list[Any]) -> NDArray[Any]:
        """Sequences by number, or by name in the order of the file."""
        if all(type(one) is int for one in taken) and not self._sequences:
            return np.array(taken)
        return np.array([self._sequences.setdefault(str(v), len(self._sequences)) for v in taken])

    def _of_passes(self, numbers: list[int], values: dict[str, list[Any]]) -> Columns:
        """Lines of a layer's tokens of one forward pass each."""
        where = partial(self._line, numbers)
        layers = of.scalars("layer", values["layer"], where).tolist()
        if "pass_id" in values:
            passes = of.scalars("pass_id", values["pass_id"], where).tolist()
        else:
            passes = [self._next_pass(layer) for layer in layers]
        parts: list[Columns] = []
        for i, (number, layer, of_pass) in enumerate(zip(numbers, layers, passes, strict=True)):
            for name in of.LISTS:
                if name in values and type(values[name][i]) not in (list, type(None)):
                    raise of.no_list(name, values[name][i], f"{self.source.path}: line {number}")
            at = partial(self._line, [number] * len(values["experts"][i] or ()))
            part: Columns = {}
            lengths = {}
            for name in of.LISTS:
                if name in values and values[name][i]:
                    part[name], lengths[name] = of.lists(name, values[name][i], at)
            if "weights" in lengths:
                if len(lengths["weights"]) != len(lengths["experts"]):
                    raise TraceError(f"{at(0)}: weights for another number of tokens than experts")
                of.check_lengths(lengths["experts"], lengths["weights"], at)
            if not part:
                continue
            first = self._position(of_pass, len(part["experts"]), number)
            n = len(part["experts"])
            part |= {
                "layer": np.full(n, layer),
                "position": first + np.arange(n),
                "sequence": np.zeros(n, np.uint32),
                "pass_id": np.full(n, of_pass),
                PLACE: np.full(n, number),
            }
            parts.append(part)
        return joined(parts)

    def _next_pass(self, layer: int) -> int:
        self._pass += layer <= self._layer
        self._layer = layer
        return self._pass

    def _position(self, of_pass: int, n: int, number: int) -> int:
        """The position of a pass's first token: tokens count up over all passes."""
        first, tokens = self._passes.setdefault(of_pass, (self._tokens, n))
        if first == self._tokens:
            self._tokens += n
        if tokens != n:
            raise TraceError(
                f"{self.source.path}: line {number}: {n} tokens, where another layer of forward "
                f"pass {of_pass} has {tokens}"
            )
        return first


def detect_lists(source: Source) -> bool:
    """Whether the text begins as a JSON list of lists of numbers."""
    return is_document(source, "[") and source.start.decode("utf-8", "replace").replace(
        " ", ""
    ).lstrip("\ufeff").replace("\n", "").startswith("[[")


def read_lists(source: Source, _options: ImportOptions) -> Recording:
    """Read a JSON list of [layer, expert, expert, ...], a (token, layer) each.

    Raises TraceError naming the entry that is something else.
    """
    found = document(source)
    rows = found if isinstance(found, list) else []

    def where(i: int) -> str:
        return f"{source.path}: entry {i}"

    entries, lengths = of.lists("experts", rows, where)
    if not len(rows) or (lengths < 2).any():
        at = int(np.argmax(lengths < 2)) if len(rows) else 0
        raise TraceError(f"{where(at)}: is not a layer and its experts")
    columns = {"layer": entries[:, 0], "experts": entries[:, 1:]}
    facts = Facts(source.path.name.split(".json")[0])
    return Recording(source.path, facts, [columns], "entry {}".format, Findings())
