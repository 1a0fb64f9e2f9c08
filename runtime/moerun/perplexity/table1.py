"""Table 1 of the base paper (arXiv 2312.17238): size and quality of quantised Mixtral-8x7B.

Published figures, to stand beside measured ones in a column of their own. The paper writes "GB";
16-bit Mixtral-8x7B has 46.7e9 weights, whose bytes are the table's 86.99 in units of 2^30.
"""

from __future__ import annotations

from dataclasses import dataclass

from moerun.format.precision import NATIVE
from moerun.store.index import StoreIndex

MODEL = "Mixtral-8x7B"


@dataclass(frozen=True, slots=True)
class Table1Row:
    """One row: GiB of the whole model, perplexity on WikiText-2 and C4, MMLU in per cent."""

    size_gib: float
    wikitext2: float
    c4: float
    mmlu: float | None


# By bits of attention and of experts; 16 is the paper's FP16.
ROWS = {
    (16, 16): Table1Row(86.99, 3.59, 6.52, 70.51),
    (16, 4): Table1Row(25.82, 3.67, 6.58, 70.3),
    (16, 3): Table1Row(23.21, 3.96, 6.78, 69.32),
    (16, 2): Table1Row(19.33, 4.52, 7.31, 66.66),
    (4, 16): Table1Row(85.16, 3.68, 6.59, None),
    (4, 4): Table1Row(23.99, 3.76, 6.66, 69.11),
    (4, 3): Table1Row(21.37, 4.05, 6.87, 68.47),
    (4, 2): Table1Row(17.54, 4.61, 7.42, 65.58),
    (3, 16): Table1Row(85.08, 3.99, 6.90, None),
    (3, 4): Table1Row(23.92, 4.06, 6.97, 66.54),
    (3, 3): Table1Row(21.31, 4.34, 7.21, 65.79),
    (3, 2): Table1Row(17.46, 4.90, 7.82, 61.83),
    (2, 16): Table1Row(84.96, 4.98, 7.92, None),
    (2, 4): Table1Row(23.79, 5.08, 8.06, 59.0),
    (2, 3): Table1Row(21.18, 5.36, 8.34, 57.67),
    (2, 2): Table1Row(17.30, 5.97, 9.11, 55.26),
}
_BITS = {NATIVE: 16, "fp16": 16, "bf16": 16, "4bit": 4, "3bit": 3, "2bit": 2}
_EXPERT = {(2 * 14336, 4096), (4096, 14336)}


def published(index: StoreIndex) -> Table1Row | None:
    """The row of a store of Mixtral-8x7B's shape at its precisions; None for any other."""
    shape = {param.shape for param in index.shape.params}
    if (index.model_type, index.n_layers, index.n_experts) != ("mixtral", 32, 8):
        return None
    if shape != _EXPERT:
        return None
    attention = _BITS.get(index.attention_precision)
    experts = _BITS.get(index.expert_format)
    return ROWS.get((attention, experts)) if attention and experts else None
