"""Precisions by name, and how records lie, for checks of options that must not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass

from moerun.errors import UsageError

NATIVE = "native"
PLAIN = ("fp32", "fp16", "bf16")
QUANTISED = ("4bit", "3bit", "2bit")
BLOCKS = ("q4_0", "q8_0")
PACKED = (*QUANTISED, *BLOCKS)
PRECISIONS = (NATIVE, *PLAIN, *PACKED)
RECORD_ALIGN = 4096  # so that reads past the page cache (O_DIRECT) may take whole records


def check_precision(precision: str) -> None:
    """UsageError for an unknown precision."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision {precision!r}: choose from {', '.join(PRECISIONS)}"
        )


@dataclass(frozen=True, slots=True)
class Precisions:
    """What a store keeps its parts in.

    expert     native, fp32, fp16, bf16, 4bit, 3bit, 2bit, q4_0 or q8_0
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
        check_precision(expert)
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
        return cls(expert, attention if attention in PACKED else chosen, chosen)

    @property
    def keeps_all(self) -> bool:
        """Whether all weights are as they were published."""
        return self.expert == self.attention == self.dense == NATIVE

    @property
    def packs_attention(self) -> bool:
        """Whether the matrices of attention are quantised too."""
        return self.attention in PACKED
