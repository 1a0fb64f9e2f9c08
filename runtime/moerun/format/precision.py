"""Precisions: what "4bit", "3bit" and "2bit" mean, and which plain ones there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moerun.errors import RunError, UsageError
from moerun.format.layout import align_up

ROWS = 64  # rows of one block of the nibble order
META_GROUP = 128  # scales (and zeros) that share one range, at 8 bits
KERNEL_GROUP = 32  # the smallest group torch's int4 kernel knows

Tensors = Mapping[str, torch.Tensor]
PartSpec = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits of a weight and weights of a group; scales and zeros are 8-bit in groups of 128.

    `lift` is added to a code in its nibble: it centres the codes so that the kernel's rounded
    zero term stays small.
    """

    name: str
    bits: int
    group: int
    lift: int

    @property
    def passes(self) -> int:
        """Multiplies per matrix: groups below the kernel's smallest take turns."""
        return max(1, KERNEL_GROUP // self.group)

    def check(self, name: str, columns: int) -> None:
        """Raises RunError when a matrix of so many input columns does not divide into groups."""
        unit = max(self.group, KERNEL_GROUP)
        if columns % unit:
            raise RunError(
                f"{name} has {columns} input columns, which {self.name} cannot divide into groups "
                f"of {unit}: pack with another precision"
            )

    def parts(self, rows: int, columns: int) -> list[PartSpec]:
        """The tensors of one packed matrix [rows, columns]: name, dtype, shape."""
        padded = align_up(rows, ROWS)
        weights = padded * columns
        metas = align_up(padded * columns // self.group, META_GROUP)
        low_bits = 4 if self.bits == 4 else 2
        codes: list[PartSpec] = [("codes", torch.uint8, (weights * low_bits // 8,))]
        if self.bits == 3:
            codes.append(("high", torch.uint8, (weights // 8,)))
        return [
            *codes,
            ("scales", torch.uint8, (metas,)),
            ("zeros", torch.uint8, (metas,)),
            # step and least value of the scales, then of the zeros
            ("ranges", torch.float16, (4, metas // META_GROUP)),
        ]


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("4bit", bits=4, group=64, lift=0),
        Scheme("3bit", bits=3, group=64, lift=4),
        Scheme("2bit", bits=2, group=16, lift=6),
    )
}


PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NATIVE = "native"
PRECISIONS = (NATIVE, *PLAIN, *SCHEMES)


def scheme_of(precision: str) -> Scheme | None:
    """The quantisation of a precision, None for a plain one. Raises RunError for an unknown one."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision {precision!r}: choose from {', '.join(PRECISIONS)}"
        )
    return SCHEMES.get(precision)


@dataclass(frozen=True, slots=True)
class Precisions:
    """What a store keeps its parts in.

    expert     native, fp32, fp16, bf16, 4bit, 3bit or 2bit
    attention  the same of its projections; plain ones are those of the dense weights
    dense      everything else: native, fp32, fp16 or bf16
    """

    expert: str
    attention: str
    dense: str

    @classmethod
    def chosen(cls, expert: str, attention: str, dense: str | None) -> Precisions:
        """By default dense weights are as plain attention, then as plain experts.

        Raises RunError for an unknown precision, or plain attention that is not the dense weights'.
        """
        scheme_of(expert)
        if attention not in PRECISIONS:
            raise UsageError(
                f"attention cannot be {attention!r}: choose from {', '.join(PRECISIONS)}"
            )
        plain = next((p for p in (attention, expert) if p in PLAIN), NATIVE)
        chosen = dense or plain
        if chosen != NATIVE and chosen not in PLAIN:
            raise UsageError(
                f"dense weights cannot be {chosen!r}: choose from {', '.join((NATIVE, *PLAIN))}"
            )
        if attention in PLAIN and attention != chosen:
            raise UsageError(
                f"attention in {attention} takes dense weights in {attention}, not {chosen}: "
                "unquantised they are multiplied together"
            )
        return cls(expert, attention if attention in SCHEMES else chosen, chosen)

    @property
    def packs_attention(self) -> bool:
        """Whether the matrices of attention are quantised too."""
        return self.attention in SCHEMES
