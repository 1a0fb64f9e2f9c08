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
from moerun.format.block_scheme import BlockScheme
from moerun.format.expert import ExpertShape
from moerun.format.layout import RecordLayout
from moerun.format.precision import NATIVE, PACKED_SCHEMES

INDEX_FILE = "index.json"
DENSE_FILE = "dense.safetensors"
ATTENTION_FILE = "attention.safetensors"
FORMAT = "moerun expert store"
FORMAT_VERSION = 1
CODED_VERSION = 2
"""Of stores whose experts are kept in the bits of their publication, which version 1 had not."""
BLOCK_VERSION = 3
"""Of stores that keep a GGUF file's blocks so, in which layers may differ."""
VERSIONS = (FORMAT_VERSION, CODED_VERSION, BLOCK_VERSION)


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
    kind: int = 0  # of the experts' shape, where layers differ in what they keep experts in

    def to_json(self) -> dict[str, Any]:
        """The layer as an entry of `index.json`."""
        return {
            "module": self.module,
            "file": self.file,
            "bytes": self.file_bytes,
            "offsets": list(self.offsets),
            "crc32": list(self.crc32),
            **({"kind": self.kind} if self.kind else {}),
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
        kind = int(described.get("kind", 0))
        module, file = _text(described["module"]), _file(described["file"])
        return cls(module, file, n_bytes, offsets, crc32, kind)


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """One quantised matrix [rows, columns] of attention: its module, offset and CRC-32."""

    module: str  # of the model, e.g. model.layers.3.self_attn.q_proj
    rows: int
    columns: int
    offset: int
    crc32: int
    coding: BlockScheme | None = None  # the file's own blocks, at native precision

    @property
    def shape(self) -> ExpertShape:
        """The matrix as its record keeps it."""
        return ExpertShape.matrix(self.rows, self.columns, self.coding)

    def to_json(self) -> dict[str, Any]:
        """The record as an entry of `index.json`."""
        described = asdict(self)
        del described["coding"]
        return described | ({"coding": self.coding.to_json()} if self.coding else {})


@dataclass(frozen=True, slots=True)
class AttentionRecords:
    """The records of attention, where it is quantised. Their layout follows from their shape.

    At native precision these are the projections that a GGUF file has in blocks that are kept; the
    others are among the dense weights.
    """

    precision: str
    file: str
    file_bytes: int
    linears: tuple[LinearRecord, ...]

    def layout(self, linear: LinearRecord) -> RecordLayout:
        """Where the parts of a matrix lie in its record."""
        return linear.shape.record(self.precision)

    @property
    def kept_as(self) -> str:
        """What reports call the precision: that of the file's own blocks at native precision."""
        names = {linear.coding.name for linear in self.linears if linear.coding}
        return "+".join(sorted(names)) or self.precision

    @property
    def n_weights(self) -> int:
        """Number of attention weights that are quantised."""
        return sum(linear.rows * linear.columns for linear in self.linears)

    def to_json(self) -> dict[str, Any]:
        """Attention as an entry of `index.json`."""
        linears = [linear.to_json() for linear in self.linears]
        return {
            "precision": self.precision,
            "file": self.file,
            "file_bytes": self.file_bytes,
            "linears": linears,
        }

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> AttentionRecords:
        """Raises KeyError, TypeError or ValueError when the description is not one of to_json."""
        precision = described["precision"]
        if precision not in (*PACKED_SCHEMES, NATIVE):
            raise ValueError(f"attention in {precision!r}")
        linears = tuple(
            LinearRecord(
                _text(record["module"]),
                int(record["rows"]),
                int(record["columns"]),
                int(record["offset"]),
                int(record["crc32"]),
                BlockScheme.from_json(record["coding"]) if precision == NATIVE else None,
            )
            for record in described["linears"]
        )
        n_bytes = int(described["file_bytes"])
        _check_offsets([linear.offset for linear in linears], n_bytes)
        return cls(precision, _file(described["file"]), n_bytes, linears)


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
        return self.attention.kept_as if self.attention else self.dense_precision

    @property
    def expert_format(self) -> str:
        """What the experts' weights are kept as: the precision, or at native precision how they
        are published, such as fp8, mxfp4 or q4_k+q6_k, where they are kept in those bits."""
        return self.shape.kept_as(self.precision) or self.precision

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

    @property
    def _version(self) -> int:
        """The oldest version of the format that has what this store has."""
        if self.shape.is_decoded(self.precision):
            return CODED_VERSION
        return BLOCK_VERSION if self.shape.codings(self.precision) else FORMAT_VERSION

    def layout_of(self, layer: int) -> RecordLayout:
        """Where the parts of an expert of this layer lie in its record."""
        kind = self.layers[layer].kind
        return self.shape.record(self.precision, kind) if self.shape.others else self.layout

    def to_json(self) -> dict[str, Any]:
        """The whole content of `index.json`."""
        return {
            "format": FORMAT,
            "version": self._version,
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
                **self.shape.to_json(),
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
        shape = ExpertShape.from_json(expert)
        if not layers or not all(0 <= layer.kind < len(shape.kinds) for layer in layers):
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
            shape=shape,
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
        layer = next((n for n, each in enumerate(index.layers) if each.file == file), None)
        crc32 = () if layer is None else index.layers[layer].crc32
        layout = index.layout if layer is None else index.layout_of(layer)
        stored = {f"expert.{e}": (layout, crc) for e, crc in enumerate(crc32)}
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
    if described.get("version") not in VERSIONS:
        raise RunError(
            f"{path} has store format version {described.get('version')!r}, this moerun reads "
            f"{FORMAT_VERSION} to {BLOCK_VERSION}: pack the store again"
        )
    try:
        return StoreIndex.from_json(described)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:  # 1e999, too
        raise RunError(f"{path} is damaged ({error}): pack the store again") from error
