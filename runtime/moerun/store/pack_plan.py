"""What a pack will write and how big it is, and the index of what it wrote."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from moeroute.models import dense_sizes

from moerun.checkpoint.families import shared_experts_of, top_k_of, vocabulary_of
from moerun.checkpoint.source import ModelSource
from moerun.format.block_scheme import BlockScheme
from moerun.format.expert import ExpertShape
from moerun.format.layout import RecordLayout
from moerun.format.names import RECORD_ALIGN
from moerun.format.precision import PACKED_SCHEMES, Precisions
from moerun.format.tensorfile import TensorEntry, bytes_of, header_of, memory_of
from moerun.store.index import (
    ATTENTION_FILE,
    AttentionRecords,
    LayerRecords,
    LinearRecord,
    StoreIndex,
    experts_file,
)
from moerun.versions import store_packages

_SPARE_BYTES = 16 << 20  # index, tokenizer, and what the file system itself takes


@dataclass(frozen=True, slots=True)
class Record:
    """One record to write. `what` names it to people; `read` gives its tensors, unquantised."""

    name: str
    what: str
    shape: ExpertShape
    layout: RecordLayout
    read: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class RecordFile:
    """A file of records of one precision."""

    name: str
    precision: str
    records: tuple[Record, ...]

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of the file, as safetensors has them: each record as its bytes."""
        return {r.name: (torch.uint8, (r.layout.record_bytes,)) for r in self.records}

    def entries(self) -> tuple[int, dict[str, TensorEntry]]:
        """Bytes of the file, and where each record lies."""
        header, entries = header_of(self.tensors, align=RECORD_ALIGN)
        return len(header) + sum(entry.nbytes for entry in entries.values()), entries


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What a pack will write, known before it starts."""

    precisions: Precisions
    layout: RecordLayout
    experts: tuple[RecordFile, ...]  # one file a MoE layer
    attention: RecordFile | None
    dense_bytes: int

    @property
    def files(self) -> tuple[RecordFile, ...]:
        """Files of records that a pack writes: one a layer, and one of quantised attention."""
        return self.experts if self.attention is None else (*self.experts, self.attention)

    @property
    def n_records(self) -> int:
        """Number of records in all files."""
        return sum(len(file.records) for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of disk that the pack takes, index and tokenizer included."""
        return sum(file.entries()[0] for file in self.files) + self.dense_bytes + _SPARE_BYTES


def plan_pack(model: ModelSource, precisions: Precisions) -> PackPlan:
    """Sizes of a pack. Raises RunError when a precision does not fit the model's shapes."""
    dense = model.dense_tensors()
    header, _ = header_of(dense)
    layout = model.shape.record(precisions.expert)  # of the first kind of layers
    return PackPlan(
        precisions=precisions,
        layout=layout,
        experts=tuple(
            _experts_of(model, layer, precisions.expert) for layer in range(len(model.layers))
        ),
        attention=_attention_of(model, precisions),
        dense_bytes=len(header) + sum(bytes_of(dtype, shape) for dtype, shape in dense.values()),
    )


def _experts_of(model: ModelSource, layer: int, precision: str) -> RecordFile:
    layout = model.shape.record(precision, model.kind(layer))
    read = model.read_coded_expert if model.shape.codings(precision) else model.read_expert
    records = (
        Record(
            name=f"expert.{expert}",
            what=f"expert {expert} of layer {layer}",
            shape=model.shape,
            layout=layout,
            read=partial(read, layer, expert),
        )
        for expert in range(model.n_experts)
    )
    return RecordFile(experts_file(layer), precision, tuple(records))


def _attention_of(model: ModelSource, precisions: Precisions) -> RecordFile | None:
    """The records of attention that is quantised, or kept in the blocks of a file."""
    kept = model.kept_attention
    modules = model.attention if precisions.packs_attention else kept
    records = []
    for module in modules:
        rows, columns = model.attention[module]
        if precisions.packs_attention:
            PACKED_SCHEMES[precisions.attention].check(module, columns)
        shape = ExpertShape.matrix(rows, columns, kept.get(module))
        layout = shape.record(precisions.attention)
        records.append(Record(module, module, shape, layout, partial(model.read_attention, module)))
    return RecordFile(ATTENTION_FILE, precisions.attention, tuple(records)) if records else None


def crc32_of(record: torch.Tensor) -> int:
    """The CRC-32 of a record's bytes, as the index has it."""
    return zlib.crc32(memory_of(record))


Checksums = Mapping[tuple[str, str], int]
"""The CRC-32 of each record written, by the names of file and record."""


def build_index(
    model: ModelSource,
    plan: PackPlan,
    crc32: Checksums,
    *,
    name: str,
    revision: str | None,
    source_digest: str,
) -> StoreIndex:
    """The index of a finished pack."""
    dense = {
        tensor: bytes_of(dtype, shape) for tensor, (dtype, shape) in model.dense_tensors().items()
    }
    attention = plan.attention.records if plan.attention else ()
    packed = {record.name: record.layout.record_bytes for record in attention}
    config = model.config
    sizes = dense_sizes(dense | packed, model.layers, vocabulary_of(config))
    return StoreIndex(
        model=name,
        revision=revision,
        model_type=config.model_type,
        top_k=top_k_of(config),
        n_shared_experts=shared_experts_of(config),
        precision=plan.precisions.expert,
        dense_precision=plan.precisions.dense,
        dense_bytes=plan.dense_bytes,
        dense_skew=model.dense_skew(),
        layer_bytes=sizes.layer_bytes,
        token_bytes=sizes.token_bytes,
        shape=model.shape,
        layout=plan.layout,
        layers=_layers(model, plan, crc32),
        source_digest=source_digest,
        source_bytes=model.checkpoint.total_bytes,
        packages=store_packages(),
        attention=_attention(plan.attention, crc32) if plan.attention else None,
    )


def _layers(model: ModelSource, plan: PackPlan, crc32: Checksums) -> tuple[LayerRecords, ...]:
    layers = []
    for number, (module, file) in enumerate(zip(model.layers, plan.experts, strict=True)):
        file_bytes, entries = file.entries()
        layers.append(
            LayerRecords(
                module=module,
                file=file.name,
                file_bytes=file_bytes,
                offsets=tuple(entries[record.name].offset for record in file.records),
                crc32=tuple(crc32[file.name, record.name] for record in file.records),
                kind=model.kind(number) if model.shape.codings(plan.precisions.expert) else 0,
            )
        )
    return tuple(layers)


def _attention(file: RecordFile, crc32: Checksums) -> AttentionRecords:
    file_bytes, entries = file.entries()
    linears = []
    for record in file.records:
        (param,) = record.shape.params
        offset, crc = entries[record.name].offset, crc32[file.name, record.name]
        coding = param.coding if isinstance(param.coding, BlockScheme) else None
        rows, columns = param.shape
        linears.append(LinearRecord(record.name, rows, columns, offset, crc, coding))
    return AttentionRecords(file.precision, file.name, file_bytes, tuple(linears))
