"""How packed matrices compute from the memory of their slot, one class a precision and device.

A slot holds the form an expert is computed in. Where that is the record as it was read, reading
lands in the slot itself; where it is not, `arrive` derives it, once a load and off the hot path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moerun.errors import RunError
from moerun.format.bitplanes import expand_codes, expand_scales
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.layout import RecordLayout, align_up
from moerun.format.precision import ROWS, BlockScheme, Scheme, scheme_of
from moerun.kernels.blocks import BlockExpert, BlockLinear
from moerun.kernels.coded import CodedLinear, Scratch, scratch_bytes
from moerun.kernels.linears import (
    FusedLinear,
    Linear,
    NibbleLinear,
    PlainLinear,
    kernel_reads_nibbles,
    parts_of,
    to_kernel_order,
)


class ExpertWeights(Protocol):
    """One expert, ready to compute. The gate between `up` and `down` is the model's own."""

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """x[T, H] through the fused gate and up projection: [T, 2 I] (or [T, I] without gate)."""

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """h[T, I] through the down projection: [T, H]."""


class ExpertSlot(ExpertWeights, Protocol):
    """The slot that experts come and go in; `linears` are its matrices, in the shape's order.

    `landing` is where a record is to be read or copied to, uint8[record_bytes] within the slot;
    None when it must land elsewhere first. Either way `arrive(record)` makes it computable.
    """

    landing: torch.Tensor | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of the expert in the slot."""

    def arrive(self, record: torch.Tensor) -> None:
        """Take up the expert whose record, uint8[record_bytes], has been read.

        Nothing may be computing from the slot meanwhile. Issues work on the current stream.
        """


class SlotForm:
    """The form that experts of one shape and precision take on one device."""

    def __init__(self, shape: ExpertShape, precision: str, device: torch.device) -> None:
        self._shape = shape
        scheme = scheme_of(precision)
        self._blocks = bool(shape.blocks(precision))
        self._scheme = None if isinstance(scheme, BlockScheme) else scheme
        self._device = device
        self._precision = precision
        if self._blocks and device.type != "cpu":
            raise RunError(
                f"weights in {shape.kept_as(precision) or precision} are computed on the CPU "
                "alone: give --device cpu, or pack with bf16 or 4bit"
            )
        self.layout = shape.record(precision)
        self.record_bytes = self.layout.record_bytes
        decoded = shape.is_decoded(precision)
        self._scratch = Scratch(scratch_bytes(shape), device) if decoded else None
        self._extra = self._extra_layout()
        self.slot_bytes = self._extra.record_bytes
        """Bytes of memory one slot takes, at least those of the record where it lands inside."""
        if self._lands_inside:
            self.slot_bytes += self.record_bytes

    @property
    def _takes_nibbles(self) -> bool:
        """Whether torch's kernel for the CPU computes, which wants its own scales."""
        return self._scheme is not None and self._device.type == "cpu"

    @property
    def _lands_inside(self) -> bool:
        scheme = self._scheme
        return not self._takes_nibbles or (
            scheme is not None and scheme.bits == 4 and kernel_reads_nibbles()
        )

    @property
    def expands(self) -> bool:
        """Whether a slot holds an expert's codes in more bits than its record."""
        return not self._lands_inside and self._scheme is not None and self._scheme.bits < 4

    def _extra_layout(self) -> RecordLayout:
        """What a slot holds besides a record that landed in it."""
        if not self._takes_nibbles:
            return RecordLayout.of([])
        assert self._scheme is not None
        tensors = []
        for param in self._shape.params:
            if not param.is_matrix:
                if not self._lands_inside:
                    tensors.append((param.name, param.dtype, param.shape))
                continue
            rows, columns = param.rows_columns
            padded, groups = align_up(rows, ROWS), columns // self._scheme.group
            passes = self._scheme.passes
            if not self._lands_inside:
                tensors.append((f"{param.name}.nibbles", torch.uint8, (padded * columns // 2,)))
            tensors.append(
                (f"{param.name}.terms", torch.bfloat16, (passes, groups // passes, padded, 2))
            )
        return RecordLayout.of(tensors)

    def bind(self, memory: torch.Tensor) -> ExpertSlot:
        """The slot that lives in `memory`, uint8[slot_bytes] on the form's device."""
        if self._blocks:
            return self._in_blocks(memory)
        if not self._takes_nibbles:
            views = self.layout.views(memory)
            if self._scheme is None:
                return PlainSlot(self._shape, views, memory[: self.record_bytes], self._scratch)
            return FusedSlot(self._shape, self._scheme, views, memory[: self.record_bytes])
        assert self._scheme is not None
        landing = memory[: self.record_bytes] if self._lands_inside else None
        extra = memory[self.record_bytes :] if self._lands_inside else memory
        return NibbleSlot(self._shape, self._scheme, self.layout, landing, self._extra.views(extra))

    def _in_blocks(self, memory: torch.Tensor) -> BlockSlot | MixedSlot:
        shape, precision, landing = self._shape, self._precision, memory[: self.record_bytes]
        slots = []
        for number, kind in enumerate(shape.kinds if shape.codings(precision) else (shape,)):
            views = shape.record(precision, number).views(memory)
            slots.append(BlockSlot(kind, kind.blocks(precision), views, landing))
        return MixedSlot(slots, landing) if len(slots) > 1 else slots[0]


class _Slot:
    """What all slots have: an expert's two matrices, or those of whatever else was packed."""

    def __init__(self, landing: torch.Tensor | None, linears: tuple[Linear, ...]) -> None:
        self.landing = landing
        self.linears = linears

    def arrive(self, record: torch.Tensor) -> None:
        """Copy ``record``, uint8[record_bytes], to its place in the slot unless it landed there."""
        _land(record, self.landing)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return self.linears[0](x)

    def down(self, h: torch.Tensor) -> torch.Tensor:
        return self.linears[1](h)


class PlainSlot(_Slot):
    """Matrices as they were published, multiplied just as the stock experts do it: unquantised, or
    dequantised in `scratch` each time that they are used."""

    def __init__(
        self,
        shape: ExpertShape,
        views: dict[str, torch.Tensor],
        landing: torch.Tensor,
        scratch: Scratch | None = None,
    ) -> None:
        linears = (
            CodedLinear(param, views, scratch) if scratch else PlainLinear(param, views)
            for param in _matrices(shape)
        )
        super().__init__(landing, tuple(linears))


class FusedSlot(_Slot):
    """Quantised matrices that a GPU multiplies by straight from the record where it landed."""

    def __init__(
        self,
        shape: ExpertShape,
        scheme: Scheme,
        views: dict[str, torch.Tensor],
        landing: torch.Tensor,
    ) -> None:
        linears = (FusedLinear(param, scheme, views) for param in _matrices(shape))
        super().__init__(landing, tuple(linears))


class BlockSlot(_Slot):
    """Matrices in blocks of llama.cpp, which the CPU multiplies by from the record where it landed.

    ``whole`` computes the expert at once, where the expert's gate is a SiLU and its matrices fit.
    """

    def __init__(
        self,
        shape: ExpertShape,
        schemes: tuple[BlockScheme, ...],
        views: dict[str, torch.Tensor],
        landing: torch.Tensor,
    ) -> None:
        linears = tuple(
            BlockLinear(param, scheme, views)
            for param, scheme in zip(_matrices(shape), schemes, strict=True)
        )
        whole = BlockExpert(*linears) if len(linears) == 2 else None
        self.whole = whole if whole and whole.fits else None
        super().__init__(landing, linears)


class MixedSlot:
    """A slot for experts of several kinds of layers: the record in it tells which one it holds."""

    def __init__(self, slots: Sequence[BlockSlot], landing: torch.Tensor) -> None:
        """``slots`` share their memory, of which ``landing`` is the record; one for each kind."""
        self.landing: torch.Tensor | None = landing
        self._slots = tuple(slots)
        self.computes_whole = all(slot.whole for slot in slots)
        self._kind = landing[:1].numpy()  # the first part of each record

    @property
    def now(self) -> BlockSlot:
        """The slot as the expert that is in it needs it."""
        return self._slots[int(self._kind[0])]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of the expert that is in the slot."""
        return self.now.linears

    def arrive(self, record: torch.Tensor) -> None:
        """Copy ``record``, uint8[record_bytes], to its place in the slot unless it landed there."""
        _land(record, self.landing)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """x[T, H] through the fused gate and up projection."""
        return self.now.up(x)

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """h[T, I] through the down projection."""
        return self.now.down(h)


def computes_whole(slot: object) -> bool:
    """Whether any expert that comes into a slot can be computed at once, where its gate is a
    SiLU."""
    if isinstance(slot, MixedSlot):
        return slot.computes_whole
    return whole_of(slot) is not None


def whole_of(slot: object) -> BlockExpert | None:
    """What computes all of the expert in a slot at once, where its gate is a SiLU; None where
    nothing does."""
    if isinstance(slot, MixedSlot):
        slot = slot.now
    return slot.whole if isinstance(slot, BlockSlot) else None


class NibbleSlot(_Slot):
    """Quantised matrices as torch's int4 kernel for the CPU reads them; activations in bfloat16.

    Many tokens are multiplied another way, from the same memory: see `blockwise`.
    """

    def __init__(
        self,
        shape: ExpertShape,
        scheme: Scheme,
        layout: RecordLayout,
        landing: torch.Tensor | None,
        extra: dict[str, torch.Tensor],
    ) -> None:
        self._scheme = scheme
        self._layout = layout
        self._shape = shape
        self._extra = extra
        views = extra if landing is None else extra | layout.views(landing)
        linears = (NibbleLinear(param, scheme, views) for param in _matrices(shape))
        super().__init__(landing, tuple(linears))

    def arrive(self, record: torch.Tensor) -> None:
        """Take up the record, and derive the terms and the order of codes that the kernel reads."""
        landing = self.landing
        _land(record, landing)
        views = self._layout.views(record)
        for param in self._shape.params:
            if not param.is_matrix:
                if landing is None:
                    self._extra[param.name].copy_(views[param.name])
                continue
            parts = parts_of(param, views)
            expand_scales(parts, self._scheme, self._extra[f"{param.name}.terms"])
            if landing is None:
                nibbles = self._extra[f"{param.name}.nibbles"]
                expand_codes(parts, self._scheme, nibbles)
                if not kernel_reads_nibbles():
                    to_kernel_order(nibbles, param.rows_columns[1])


def _land(record: torch.Tensor, landing: torch.Tensor | None) -> None:
    """Copy a record that was read elsewhere to where it belongs."""
    if landing is not None and record.data_ptr() != landing.data_ptr():
        landing.copy_(record, non_blocking=True)


def _matrices(shape: ExpertShape) -> list[ExpertParam]:
    return [param for param in shape.params if param.is_matrix]
