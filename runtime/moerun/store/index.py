"""`index.json` of an expert store: what is stored, how a record is laid out, where each lies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moepolicy.outputs import written_whole
from moeroute.jsontext import parse_json

from moerun.errors import RunError
from moerun.format.expert import ExpertShape
from moerun.format.layout import RecordLayout
from moerun.format.precision import PACKED_SCHEMES

INDEX_FILE = "index.json"
DENSE_FILE = "dense.safetensors"
ATTENTION_FILE = "attention.safetensors"
FORMAT = "moerun expert store"
FORMAT_VERSION = 1
CODED_VERSION = 2
"""Of stores whose experts are kept in the bits of their publication, which version 1 had not."""


def experts_file(layer: int) -> str:
    """Name of the file that holds the records of a layer."""
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """The records of one MoE layer: their file, and for each expert offset and CRC-32."""

    module: str  # of the model, e.g. model.layers.3.mlp.experts
    file: str
    file_bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The layer as an entry of `index.json`."""
        return {
            "module": self.module,
            "file": self.file,
            "bytes": self.file_bytes,
            "offsets": list(self.offsets),
            "crc32": list(self.crc32),
        }

    @classmethod
    def from_json(cls, described: dict[str, Any], n_experts: int) -> LayerRecords:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json, or
        is not of so many experts."""
        offsets = tuple(map(int, described["offsets"]))
        crc32 = tuple(map(int, described["crc32"]))
        if not len(offsets) == len(crc32) == n_experts:
            raise ValueError("layers and experts do not match")
        n_bytes = int(described["bytes"])
        _check_offsets(offsets, n_bytes)
        return cls(_text(described["module"]), _file(described["file"]), n_bytes, offsets, crc32)


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """One quantised matrix [rows, columns] of attention: its module, offset and CRC-32."""

    module: str  # of the model, e.g. model.layers.3.self_attn.q_proj
    rows: int
    columns: int
    offset: int
    crc32: int


@dataclass(frozen=True, slots=True)
class AttentionRecords:
    """The records of attention, where it is quantised. Their layout follows from their shape."""

    precision: str
    file: str
    file_bytes: int
    linears: tuple[LinearRecord, ...]

    def layout(self, linear: LinearRecord) -> RecordLayout:
        """Where the parts of a matrix lie in its record."""
        return ExpertShape.matrix(linear.rows, linear.columns).record(self.precision)

    @property
    def n_weights(self) -> int:
        """Number of attention weights that are quantised."""
        return sum(linear.rows * linear.columns for linear in self.linears)

    def to_json(self) -> dict[str, Any]:
        """Attention as an entry of `index.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> AttentionRecords:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        if described["precision"] not in PACKED_SCHEMES:
            raise ValueError(f"attention in {described['precision']!r}")
        linears = tuple(
            LinearRecord(
                _text(record["module"]),
                int(record["rows"]),
                int(record["columns"]),
                int(record["offset"]),
                int(record["crc32"]),
            )
            for record in described["linears"]
        )
        n_bytes = int(described["file_bytes"])
        _check_offsets([linear.offset for linear in linears], n_bytes)
        return cls(described["precision"], _file(described["file"]), n_bytes, linears)


def _text(value: Any) -> str:
    """Raises TypeError where ``value`` is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} where a text belongs")
    return value


def _skew(value: Any) -> int:
    """Raises TypeError or ValueError where ``value`` is no remainder of an address by 64."""
    if not 0 <= int(value) < 64:
        raise ValueError(f"a skew of {value!r:.60}")
    return int(value)


def _file(value: Any) -> str:
    """Raises TypeError or ValueError where ``value`` is not the name of a file in the store."""
    if Path(name := _text(value)).name != name or "\0" in name:
        raise ValueError(f"{name!r:.60} is no name of a file of the store")
    return name


def _check_offsets(offsets: Sequence[int], n_bytes: int) -> None:
    """Raises ValueError where a record would begin outside a file of so many bytes."""
    for offset in offsets:
        if not 0 <= offset < n_bytes:
            raise ValueError(f"a record at {offset} of a file of {n_bytes} bytes")


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """Everything that is known of a store without reading its weights.

    `layer_bytes` are the weights of one MoE layer besides its routed experts (mean over layers),
    `token_bytes` what one token reads outside those layers: an embedding row, layers without
    experts, the last norm and the head. `dense_bytes` are those of everything
    that is neither routed expert nor `attention`, which is None unless quantised. `dense_skew` are
    the dense tensors that stock transformers computes at addresses off a multiple of 64: name and
    remainder. `dense_crc32` are their checksums by name; None where a store is older than those.
    """

    model: str
    revision: str | None
    model_type: str
    top_k: int
    n_shared_experts: int
    precision: str
    dense_precision: str
    dense_bytes: int
    dense_skew: dict[str, int]
    layer_bytes: int
    token_bytes: int
    shape: ExpertShape
    layout: RecordLayout
    layers: tuple[LayerRecords, ...]
    source_digest: str
    source_bytes: int
    packages: dict[str, str] = field(default_factory=dict)
    attention: AttentionRecords | None = None
    dense_crc32: dict[str, int] | None = None

    @property
    def attention_precision(self) -> str:
        """Precision of attention: its own if quantised, else that of the dense weights."""
        return self.attention.precision if self.attention else self.dense_precision

    @property
    def expert_format(self) -> str:
        """What the experts' weights are kept as: the precision, or at native precision how they
        are published, fp8 or mxfp4, where they are kept in those bits."""
        coding = self.shape.coding(self.precision)
        return coding.name if coding else self.precision

    @property
    def expert_label(self) -> str:
        """The experts' precision for people: native (fp8), 4bit."""
        kept = self.expert_format
        return kept if kept == self.precision else f"{self.precision} ({kept})"

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.layers)

    @property
    def n_experts(self) -> int:
        """Number of experts of a layer."""
        return len(self.layers[0].offsets)

    def to_json(self) -> dict[str, Any]:
        """The whole content of `index.json`."""
        return {
            "format": FORMAT,
            "version": CODED_VERSION if self.shape.coding(self.precision) else FORMAT_VERSION,
            "model": {
                "name": self.model,
                "revision": self.revision,
                "type": self.model_type,
                "layers": self.n_layers,
                "experts": self.n_experts,
                "top_k": self.top_k,
                "shared_experts": self.n_shared_experts,
            },
            "source": {"digest": self.source_digest, "bytes": self.source_bytes},
            "dense": {
                "precision": self.dense_precision,
                "bytes": self.dense_bytes,
                "skew": self.dense_skew,
                "layer_bytes": self.layer_bytes,
                "token_bytes": self.token_bytes,
                "crc32": self.dense_crc32,
            },
            "attention": self.attention.to_json() if self.attention else None,
            "expert": {
                "precision": self.precision,
                "params": self.shape.to_json(),
                "record": self.layout.to_json(),
            },
            "layers": [layer.to_json() for layer in self.layers],
            "packages": self.packages,
        }

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> StoreIndex:
        """Raises AttributeError, KeyError, TypeError or ValueError when the description is not one
        of to_json."""
        model, dense, expert = described["model"], described["dense"], described["expert"]
        # Older stores have neither.
        attention, dense_crc32 = described.get("attention"), dense.get("crc32")
        n_experts = int(model["experts"])
        layers = tuple(LayerRecords.from_json(each, n_experts) for each in described["layers"])
        if not layers:
            raise ValueError("layers and experts do not match")
        return cls(
            model=_text(model["name"]),
            revision=None if model["revision"] is None else _text(model["revision"]),
            model_type=_text(model["type"]),
            top_k=int(model["top_k"]),
            n_shared_experts=int(model["shared_experts"]),
            precision=_text(expert["precision"]),
            dense_precision=_text(dense["precision"]),
            dense_bytes=int(dense["bytes"]),
            dense_skew={name: _skew(skew) for name, skew in dense["skew"].items()},
            layer_bytes=int(dense["layer_bytes"]),
            token_bytes=int(dense["token_bytes"]),
            shape=ExpertShape.from_json(expert["params"]),
            layout=RecordLayout.from_json(expert["record"]),
            layers=layers,
            source_digest=_text(described["source"]["digest"]),
            source_bytes=int(described["source"]["bytes"]),
            packages={name: _text(v) for name, v in dict(described["packages"]).items()},
            attention=AttentionRecords.from_json(attention) if attention else None,
            dense_crc32=(
                {name: int(crc) for name, crc in dict(dense_crc32).items()} if dense_crc32 else None
            ),
        )


def checksums(
    index: StoreIndex, file: str, precision: str, records: Mapping[str, RecordLayout]
) -> dict[str, int] | None:
    """The CRC-32 of each record of a file; None unless it holds just these, laid out so."""
    attention = index.attention
    if attention and file == attention.file:
        stored = {r.module: (attention.layout(r), r.crc32) for r in attention.linears}
        kept = attention.precision
    else:
        layer = next((layer for layer in index.layers if layer.file == file), None)
        crc32 = layer.crc32 if layer else ()
        stored = {f"expert.{e}": (index.layout, crc) for e, crc in enumerate(crc32)}
        kept = index.precision
    if kept != precision or {name: layout for name, (layout, _) in stored.items()} != records:
        return None
    return {name: crc for name, (_, crc) in stored.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def read_index(folder: Path) -> StoreIndex:
    """Raises RunError when the folder holds no store that this version reads."""
    path = folder / INDEX_FILE
    try:
        described = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        hint = "the folder of a pack that was finished" if folder.is_dir() else "an existing folder"
        raise RunError(
            f"{folder} holds no expert store (no {INDEX_FILE}): give {hint}, or make one with "
            "'moerun pack'"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON: pack the store again") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise RunError(
            f"{path} is not the index of an expert store: give a folder made by 'moerun pack'"
        )
    if described.get("version") not in (FORMAT_VERSION, CODED_VERSION):
        raise RunError(
            f"{path} has store format version {described.get('version')!r}, this moerun reads "
            f"{FORMAT_VERSION} and {CODED_VERSION}: pack the store again"
        )
    try:
        return StoreIndex.from_json(described)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:  # 1e999, too
        raise RunError(f"{path} is damaged ({error}): pack the store again") from error
