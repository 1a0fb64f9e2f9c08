"""The columns of a routing trace and the metadata that goes with them.

One row is one (sequence, position, layer): what the gate of that layer decided for that token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from moeroute.families import WEIGHT_RULES
from moeroute.jsontext import parse_json

FORMAT_VERSION = 1
META_KEY = "moeroute"  # of the Parquet file's key-value metadata
PHASES = ("prompt", "decode")  # row value = index
PROMPT, DECODE = 0, 1
SOURCES = ("recorded", "live", "imported", "synthetic")

PREDICTED = "predicted_logits_"
NO_EXPERT = 0xFFFF
"""Fills `experts` of a row that chose fewer than K, where the metadata says `variable_top_k`."""
REQUIRED = ("sequence", "position", "phase", "layer", "experts")


class TraceError(ValueError):
    """A trace, or what is to become one, cannot be used; the message names file, row and column.

    The message is one line: a file's text in it may hold characters that would break it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            message
            if message.isprintable()
            else "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        )


class TraceUsageError(TraceError):
    """A name or number that is wrong whatever the trace is, such as a model that does not exist."""

    exit_code = 2  # of a command that ends with it, as for an option that does not exist


class ColumnSpec(NamedTuple):
    """How one column is stored: its element type and how many elements a row has."""

    dtype: np.dtype[Any]
    per_row: str  # "" a scalar, "K" one per chosen expert, "E" one per expert of the layer


_SPECS: dict[str, ColumnSpec] = {
    "sequence": ColumnSpec(np.dtype(np.uint32), ""),
    "position": ColumnSpec(np.dtype(np.uint32), ""),
    "phase": ColumnSpec(np.dtype(np.uint8), ""),
    # Rows of one pass and layer are one step. Without the column a prompt is one pass, and so is
    # each decoded token.
    "pass_id": ColumnSpec(np.dtype(np.uint32), ""),
    "token_id": ColumnSpec(np.dtype(np.uint32), ""),
    "layer": ColumnSpec(np.dtype(np.uint16), ""),
    "experts": ColumnSpec(np.dtype(np.uint16), "K"),
    "weights": ColumnSpec(np.dtype(np.float32), "K"),
    "router_logits": ColumnSpec(np.dtype(np.float16), "E"),
    "input_norm": ColumnSpec(np.dtype(np.float32), ""),
    # What a real cache did with the row's experts: kept from recorders that know it, because a
    # simulator can be validated on it.
    "residency": ColumnSpec(np.dtype(np.uint8), "K"),
    "loaded_bytes": ColumnSpec(np.dtype(np.uint32), "K"),
}


def prediction_column(distance: int) -> str:
    """Name of the column with the predictions made `distance` layers before the row's own."""
    return f"{PREDICTED}{distance}"


def column_spec(name: str) -> ColumnSpec | None:
    """The spec of column `name`, or None if the schema has no such column."""
    suffix = name.removeprefix(PREDICTED)
    if suffix != name:
        return _SPECS["router_logits"] if suffix.isdecimal() and int(suffix) >= 1 else None
    return _SPECS.get(name)


def column_names(horizon: int) -> tuple[str, ...]:
    """All columns the schema knows for a trace with `horizon` prediction columns, in file order."""
    names = list(_SPECS)
    at = names.index("input_norm") + 1
    return (*names[:at], *(prediction_column(j + 1) for j in range(horizon)), *names[at:])


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of trace rows as NumPy columns, sorted by (sequence, position, layer).

    n rows, K experts a token, E experts a layer, h = the trace's horizon. `experts` and what is
    beside it go by weight descending; a row that chose fewer than K ends in NO_EXPERT, of weight 0,
    if the trace is of variable top-k. `predicted[j-1][i]` is the gate of row i's layer applied to
    the hidden state known j layers earlier; a row that has none is all NaN. An optional column is
    None, and then it must be None for the whole trace.
    """

    sequence: NDArray[np.uint32]  # [n] which text, from 0
    position: NDArray[np.uint32]  # [n] of the token in its text
    phase: NDArray[np.uint8]  # [n] PROMPT or DECODE
    token_id: NDArray[np.uint32] | None  # [n] of the vocabulary
    layer: NDArray[np.uint16]  # [n] counts mixture-of-experts layers only
    experts: NDArray[np.uint16]  # [n, K] that the gate chose, by weight descending
    weights: NDArray[np.float32] | None  # [n, K] as applied
    router_logits: NDArray[np.float16] | None = None  # [n, E] the gate's, of all experts
    input_norm: NDArray[np.float32] | None = None  # [n] of the vector that enters the experts
    predicted: tuple[NDArray[np.float16], ...] = ()  # h times [n, E] the gate's, applied early
    residency: NDArray[np.uint8] | None = None  # [n, K] 0 miss, 1 hit, 2 prefetch hit
    loaded_bytes: NDArray[np.uint32] | None = None  # [n, K] what fetching each expert moved
    pass_id: NDArray[np.uint32] | None = None  # [n] rows of one forward pass, in order of time

    def __len__(self) -> int:
        return len(self.sequence)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns that are there, by name, in file order."""
        present = {name: getattr(self, name) for name in _SPECS}
        present |= {prediction_column(j + 1): p for j, p in enumerate(self.predicted)}
        names = column_names(len(self.predicted))
        return {name: present[name] for name in names if present[name] is not None}

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1, as views."""
        cut = {name: column[start:stop] for name, column in self.columns().items()}
        return rows_from_columns(cut)


def rows_from_columns(columns: Mapping[str, NDArray[Any]]) -> Rows:
    """Build Rows from columns by name; an absent optional column becomes None.

    Raises TraceError naming a required column that is absent or one the schema does not have.
    """
    plain = {name: column for name, column in columns.items() if not name.startswith(PREDICTED)}
    if unknown := [name for name in columns if column_spec(name) is None]:
        raise TraceError(f"column {unknown[0]}: a trace has no such column")
    if absent := [name for name in REQUIRED if name not in plain]:
        raise TraceError(f"column {absent[0]} is missing")
    predicted = [name for name in column_names(len(columns)) if name.startswith(PREDICTED)]
    predicted = predicted[: len(columns) - len(plain)]
    if absent := [name for name in predicted if name not in columns]:
        raise TraceError(f"column {absent[0]} is missing, though later ones are there")
    arguments: dict[str, Any] = {"token_id": None, "weights": None, **plain}
    return Rows(**arguments, predicted=tuple(columns[name] for name in predicted))


@dataclass(frozen=True)
class TraceMeta:
    """What a trace is of and how it was made; JSON in the file's key-value metadata."""

    source: str  # one of SOURCES
    model: str
    n_layers: int  # mixture-of-experts layers only
    n_experts: int  # a layer
    top_k: int
    revision: str | None = None
    n_shared_experts: int = 0
    """Experts that every token uses in each layer with experts; they are not among n_experts."""
    variable_top_k: bool = False
    """Whether rows may choose fewer than top_k experts (see NO_EXPERT)."""
    physical_to_logical: list[list[int]] | None = None
    """What the recorder's expert-parallel replicas were, [n_layers][physical experts]: the logical
    expert each held at the end. None: the recorder had no replicas, or did not tell them."""
    expert_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of one expert by precision; the first is the precision the trace was made with. Empty:
    unknown."""
    expert_params: int | None = None
    """Weights of one expert; None: unknown."""
    layer_bytes: int | None = None
    """Bytes of the dense weights of a layer with experts, as run: attention, norms, gate, shared
    experts. None, and never 0, where they are unknown."""
    token_bytes: int | None = None
    """Bytes a token reads outside those layers: one embedding row, layers without experts, the last
    norm and the head. None, and never 0, where they are unknown."""
    dense_precision: str | None = None
    """What `layer_bytes` and `token_bytes` count the weights as, such as "bf16, attention 4bit"."""
    prediction: str | None = None
    """How the predicted logits were made; None if there are none."""
    horizon: int = 0
    weight_rule: str | None = None
    """How the model's gate makes weights of logits, one of `families.WEIGHT_RULES`. None:
    unknown, or none of them reproduces the weights."""
    weight_scale: float | None = None
    """What `weight_rule`'s weights are multiplied by; None where the rule is None."""
    missing_rows: int = 0
    """(token, layer) records the recorder lost or skipped: the rows a whole trace lacks."""
    corpus_digest: str | None = None
    tokenizer: str | None = None
    seed: int | None = None
    packages: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for text, good in self._constraints():
            if not good:
                raise TraceError(f"trace metadata: {text}")

    def _constraints(self) -> list[tuple[str, bool]]:
        return [
            (f"source is {self.source!r}, not one of {', '.join(SOURCES)}", self.source in SOURCES),
            (f"n_layers is {self.n_layers}, not 1..65536", 1 <= self.n_layers <= 65536),
            (
                f"n_experts is {self.n_experts}, not 1..{NO_EXPERT + 1 - self.variable_top_k}",
                1 <= self.n_experts <= NO_EXPERT + 1 - self.variable_top_k,
            ),
            (
                f"top_k is {self.top_k}, not 1..n_experts ({self.n_experts})",
                1 <= self.top_k <= self.n_experts,
            ),
            (f"horizon is {self.horizon}, not 0 or more", self.horizon >= 0),
            (f"missing_rows is {self.missing_rows}, not 0 or more", self.missing_rows >= 0),
            (
                f"weight_rule is {self.weight_rule!r}, not one of {', '.join(WEIGHT_RULES)}",
                self.weight_rule is None or self.weight_rule in WEIGHT_RULES,
            ),
            (
                "an expert's bytes are not positive",
                all(size > 0 for size in self.expert_bytes.values()),
            ),
            *(
                (f"{name} is {size}, not above 0 (null says unknown)", size is None or size > 0)
                for name in _SIZES
                for size in [getattr(self, name)]
            ),
        ]

    @property
    def precision(self) -> str | None:
        """The precision the trace was made with (first of `expert_bytes`), None if unknown."""
        return next(iter(self.expert_bytes), None)

    def width(self, column: str) -> int:
        """Elements a row of `column` has: K, E, or 0 for a scalar. KeyError if there is none."""
        spec = column_spec(column)
        if spec is None:
            raise KeyError(column)
        return {"": 0, "K": self.top_k, "E": self.n_experts}[spec.per_row]

    def with_notes(self, **notes: str) -> TraceMeta:
        """A copy with `notes` added to the notes."""
        return replace(self, notes=self.notes | notes)

    def to_json(self) -> str:
        """One line of JSON, stable for equal metadata."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> TraceMeta:
        """Parse `to_json`'s text. Raises TraceError saying what is wrong with it."""
        try:
            found = parse_json(text)
        except json.JSONDecodeError as error:
            raise TraceError(f"trace metadata is not JSON ({error.msg})") from None
        if not isinstance(found, dict):
            raise TraceError("trace metadata is not a JSON object")
        version = found.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise TraceError(
                f"trace format version {version!r}: there is none, a version is 1 to "
                f"{FORMAT_VERSION}"
            )
        if version > FORMAT_VERSION:
            raise TraceError(
                f"trace format version {version}; this program reads up to {FORMAT_VERSION}: a "
                "newer moe-offload-lab made it, and reads it"
            )
        known = {name: found[name] for name in _FIELD_CHECKS if name in found}
        for name in _SIZES:
            # Earlier importers wrote 0 where the foreign recording said nothing.
            if found.get("source") == "imported" and known.get(name) == 0:
                known[name] = None
        for name, value in known.items():
            if not _FIELD_CHECKS[name](value):
                raise TraceError(f"trace metadata: {name} cannot be {value!r}")
        try:
            return cls(**known)
        except TypeError as error:
            raise TraceError(f"trace metadata is incomplete: {error}") from None


def _checker(hint: Any) -> Callable[[Any], bool]:
    """A test whether a JSON value has the type `hint`: scalars, unions with None, dict[str, X]."""
    if isinstance(hint, UnionType):
        options = [_checker(option) for option in get_args(hint)]
        return lambda value: any(option(value) for option in options)
    if get_origin(hint) is list:
        entry = _checker(get_args(hint)[0])
        return lambda value: isinstance(value, list) and all(entry(v) for v in value)
    if get_origin(hint) is dict:
        item = _checker(get_args(hint)[1])
        return lambda value: isinstance(value, dict) and all(item(v) for v in value.values())
    if hint is bool:
        return lambda value: isinstance(value, bool)
    return lambda value: isinstance(value, hint) and not isinstance(value, bool)


_SIZES = ("expert_params", "layer_bytes", "token_bytes")
_HINTS = get_type_hints(TraceMeta)
_FIELD_CHECKS = {f.name: _checker(_HINTS[f.name]) for f in fields(TraceMeta)}
