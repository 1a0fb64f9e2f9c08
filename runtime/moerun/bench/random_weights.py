"""Random weights of true sizes: records of experts and of attention, and dense weights.

Codes, scales and zeros are drawn in the packed form itself, so that nothing is quantised. One
record is drawn; every other is that one with each part turned by its own offset, which costs no
more than copying it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from moerun.checkpoint.families import find_attention
from moerun.format.bitplanes import SCALE_UNIT
from moerun.format.expert import ExpertShape
from moerun.format.names import RECORD_ALIGN
from moerun.format.precision import PACKED_SCHEMES, BlockScheme, Scheme, scheme_of
from moerun.format.tensorfile import bytes_of, header_of
from moerun.store.index import ATTENTION_FILE, AttentionRecords, LinearRecord

WEIGHT_STD = 0.02
_DRAWN = 1 << 20  # dense weights repeat a block of so many
_ZERO_SPREAD = 0.4  # of a group's zero, in codes

TensorShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


class RandomRecords:
    """Records of one layout by key; the same seed gives the same. Safe to share."""

    def __init__(self, shape: ExpertShape, precision: str, seed: int) -> None:
        self.layout = shape.record(precision)
        self.record_bytes = self.layout.record_bytes
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.zeros(self.record_bytes, dtype=torch.uint8)
        scheme = scheme_of(precision)
        for name, part in self.layout.views(drawn).items():
            _draw(name, part, scheme, generator)
        self._parts = self.layout.views(drawn)

    def write(self, key: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8[record_bytes]."""
        for name, to in self.layout.views(buffer).items():
            source = self._parts[name].view(-1)
            turn = key * 104729 % len(source)
            flat = to.view(-1)
            flat[: len(source) - turn] = source[turn:]
            flat[len(source) - turn :] = source[:turn]


class RandomAttention:
    """The projections of a model's attention, packed: a record a module."""

    def __init__(
        self, model: Any, precision: str, seed: int, kept: Mapping[str, BlockScheme] | None = None
    ) -> None:
        """Projections of one shape share what is drawn. ``kept`` are the blocks of those that
        native records keep: at native precision only these are packed. Raises RunError where the
        precision does not fit a projection."""
        self._precision = precision
        self._kept = kept or {}
        native = precision not in PACKED_SCHEMES
        found = find_attention(model)
        self._linears = [pair for pair in found if not native or pair[0] in self._kept]
        drawn: dict[ExpertShape, RandomRecords] = {}
        self._records: dict[str, RandomRecords] = {}
        for name, linear in self._linears:
            rows, columns = linear.weight.shape
            if not native:
                PACKED_SCHEMES[precision].check(name, columns)
            shape = ExpertShape.matrix(rows, columns, self._kept.get(name))
            if shape not in drawn:
                drawn[shape] = RandomRecords(shape, precision, seed)
            self._records[name] = drawn[shape]

    @property
    def record_bytes(self) -> dict[str, int]:
        """Bytes of each projection's record, by its module's name."""
        return {name: records.record_bytes for name, records in self._records.items()}

    def write(self, module: str, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8, with the record of a projection, by its module's name."""
        self._records[module].write(list(self._records).index(module), buffer)

    def described(self) -> AttentionRecords:
        """What an index says of them, without checksums."""
        file_bytes, offsets = laid_out(self.record_bytes)
        linears = tuple(
            LinearRecord(
                name, linear.out_features, linear.in_features, offset, 0, self._kept.get(name)
            )
            for (name, linear), offset in zip(self._linears, offsets, strict=True)
        )
        return AttentionRecords(self._precision, ATTENTION_FILE, file_bytes, linears)


class RandomDense:
    """Weights that are neither an expert's nor packed attention's: norms 1, the others normal, and
    ``zeros`` (biases of the ranking, tables of tokens) 0."""

    def __init__(self, tensors: TensorShapes, seed: int, zeros: Collection[str] = ()) -> None:
        self.tensors = tensors
        self._zeros = frozenset(zeros)
        self._seed = seed

    @property
    def n_bytes(self) -> dict[str, int]:
        """Bytes of each tensor, by name."""
        return {name: bytes_of(dtype, shape) for name, (dtype, shape) in self.tensors.items()}

    def draw(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Draw each tensor on the CPU, with its name."""
        generator = torch.Generator().manual_seed(self._seed + 1)
        for name, (dtype, shape) in self.tensors.items():
            if name in self._zeros:
                yield name, torch.zeros(shape, dtype=dtype)
            elif len(shape) == 1 and name.endswith("weight"):
                yield name, torch.ones(shape, dtype=dtype)
            else:
                yield name, _normals(math.prod(shape), dtype, generator).view(shape)


def record_tensors(lengths: dict[str, int]) -> TensorShapes:
    """Records by name, as safetensors is told of them: their bytes."""
    return {name: (torch.uint8, (n_bytes,)) for name, n_bytes in lengths.items()}


def laid_out(lengths: dict[str, int]) -> tuple[int, list[int]]:
    """Bytes of a file of records of such lengths, and where each lies."""
    header, entries = header_of(record_tensors(lengths), align=RECORD_ALIGN)
    file_bytes = len(header) + sum(entry.nbytes for entry in entries.values())
    return file_bytes, [entry.offset for entry in entries.values()]


def _draw(
    name: str,
    part: torch.Tensor,
    scheme: Scheme | BlockScheme | None,
    generator: torch.Generator,
) -> None:
    if part.is_floating_point() and name.rpartition(".")[2] == "ranges":
        assert isinstance(scheme, Scheme)
        part.copy_(_ranges(scheme)[:, None].expand_as(part))
    elif isinstance(scheme, BlockScheme) and name.rpartition(".")[2] == "scales":
        part.fill_(WEIGHT_STD / math.sqrt(((1 << 2 * scheme.bits) - 1) / 12))
    elif part.is_floating_point():
        part.view(-1).copy_(_normals(part.numel(), part.dtype, generator))
    else:
        part.random_(0, 256, generator=generator)


def _ranges(scheme: Scheme) -> torch.Tensor:
    """Step and least value of scales and zeros that give weights of WEIGHT_STD around 0."""
    levels = 1 << scheme.bits
    scale = WEIGHT_STD / math.sqrt((levels * levels - 1) / 12) * SCALE_UNIT
    least_zero = (levels - 1 - _ZERO_SPREAD) / 2
    return torch.tensor([scale / 2 / 255, 0.75 * scale, _ZERO_SPREAD / 255, least_zero])


def _normals(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """WEIGHT_STD normals, a drawn block over and over."""
    block = (torch.randn(min(n, _DRAWN), generator=generator) * WEIGHT_STD).to(dtype)
    return block.repeat(-(-n // len(block)))[:n]
