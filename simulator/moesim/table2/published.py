"""What arXiv 2312.17238 printed: tokens/s of Mixtral-8x7B-Instruct on four cards, batch 1."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GB_PER_S = 1e9

# Sixteen lanes of 8 or 16 GT/s, 128 bits of payload in 130, one way.
PCIE_3 = 16 * 8 * 128 / 130 / 8 * GB_PER_S
PCIE_4 = 16 * 16 * 128 / 130 / 8 * GB_PER_S

FITTED = "2bit"  # the precision whose cells the constants are fitted on
PREDICTED = "3bit"
PRECISIONS = (FITTED, PREDICTED)


class Algorithm(StrEnum):
    """The table's rows: what is switched off, one thing after the other."""

    full = "full (LRU + speculative)"
    lru = "without pre-loading"
    no_cache = "without LRU and pre-loading"
    naive = "naive (whole layers)"


@dataclass(frozen=True)
class Card:
    """One of the table's columns.

    slots            experts cached per layer
    machine          the shipped profile that holds the card's data-sheet rates
    link_bytes_per_s what the link the paper names carries one way, by the PCIe standard
    """

    name: str
    slots: int
    machine: str
    link: str
    link_bytes_per_s: float


CARDS = (
    Card("A100", 4, "a100", "PCIe 4.0 x16", PCIE_4),
    Card("3080 Mobile", 4, "rtx3080-mobile", "PCIe 4.0 x16", PCIE_4),
    Card("3060", 2, "rtx3060", "PCIe 3.0 x16", PCIE_3),
    Card("T4", 4, "t4", "PCIe 3.0 x16", PCIE_3),
)

# Tokens/s, a value a card.
TABLE: dict[str, dict[Algorithm, tuple[float, ...]]] = {
    "2bit": {
        Algorithm.full: (3.061, 2.655, 2.278, 2.092),
        Algorithm.lru: (2.918, 2.227, 2.051, 1.567),
        Algorithm.no_cache: (2.265, 1.758, 1.547, 1.168),
        Algorithm.naive: (1.392, 1.059, 0.919, 0.661),
    },
    "3bit": {
        Algorithm.full: (2.845, 2.475, 2.038, 1.603),
        Algorithm.lru: (2.683, 2.024, 1.857, 1.365),
        Algorithm.no_cache: (2.055, 1.595, 1.346, 1.061),
        Algorithm.naive: (1.246, 0.914, 1.791, 0.580),
    },
}

# Larger experts over the same link at nearly twice the speed: printed so, and not believed.
MISPRINTS = {("3bit", Algorithm.naive, "3060")}


def published(precision: str, algorithm: Algorithm, card: Card) -> float:
    """Tokens/s as printed."""
    return TABLE[precision][algorithm][CARDS.index(card)]
