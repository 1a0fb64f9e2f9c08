"""Notes on times that sizes are missing for, and on the sizes that a table assumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moeroute.schema import TraceMeta
from moeroute.sizes import TOP_K_NOTE

LOWER_BOUND = "dense weights unknown: time is a lower bound"


def expert_label(size: int | None) -> str:
    """How big experts are, for a table's title."""
    return "experts of unknown size" if size is None else f"experts of {size:,} bytes"


def dense_label(meta: TraceMeta) -> str:
    """How big the dense weights are, for a line of a table's title, and what they count as."""
    known = [
        f"{size:,} bytes a {name}"
        for name, size in (("layer", meta.layer_bytes), ("token", meta.token_bytes))
        if size is not None
    ]
    if not known:
        return "Dense weights unknown"
    reduced = f"; {meta.notes[TOP_K_NOTE]}" if TOP_K_NOTE in meta.notes else ""
    counted = f" ({meta.dense_precision})" if meta.dense_precision else ""
    missing = "layer" if meta.layer_bytes is None else "token"
    rest = f", a {missing}'s unknown" if len(known) == 1 else ""
    return f"Dense weights of {' and '.join(known)}{counted}{rest}{reduced}"


def size_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines under a table of results, given as `Result.row` has them: empty where all is known."""
    notes = []
    found = list(rows)
    if any(row["expert_bytes"] is None for row in found):
        notes += [
            "-: nothing says how big an expert is, so there are no times: give --like MODEL or",
            "  --expert-bytes",
        ]
    bounds = [row for row in found if row["time_is_lower_bound"]]
    if bounds:
        missing = [
            name
            for name in ("layer", "token")
            if any(row[f"{name}_bytes"] is None for row in bounds)
        ]
        lacking = " and ".join(f"--dense-{name}-bytes" for name in missing)
        notes += [
            f"{LOWER_BOUND}, and tokens/s an upper bound, of policies and of the limit;",
            "  stall %, limit % and gap % are those of a model whose dense weights take no time",
            f"  (bytes of a {' and of a '.join(missing)}: give --like MODEL, or {lacking})",
        ]
    return notes
