"""A trace's statistics as a table for people, or as JSON and CSV for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moepolicy.outputs import Output
from moepolicy.tables import Table, wrapped
from moeroute import Trace
from moeroute.summary import Statistic

FIELDS = ("statistic", "parameter", "value", "shuffled")


def deliver(to: Output, found: Sequence[Statistic], trace: Trace) -> None:
    """Print or write the statistics; rows for programs have the names in FIELDS.

    What a trace is too short to tell is null in JSON, empty in CSV.
    """
    rows = [
        dict(zip(FIELDS, (s.name, s.parameter, _known(s.value), _known(s.shuffled)), strict=True))
        for s in found
    ]
    made_by = {"trace": str(trace.path), "sha256": trace.digest, "title": trace.title}
    to.deliver(rows, lambda: _table(found, trace), {**made_by, "statistics": rows})


def _table(found: Sequence[Statistic], trace: Trace) -> str:
    table = Table(["statistic", "of"], ["value", "shuffled"])
    for s in found:
        table.add_row(s.name, s.parameter, _shown(s.value), _shown(s.shuffled))
    words = wrapped(in_words(found, trace.meta.top_k, trace.meta.n_experts))
    return f"{wrapped(trace.describe().splitlines())}\n{words}\n{table.render()}"


LOCAL = 0.05  # by so much must experts repeat more often than by chance


def in_words(found: Sequence[Statistic], top_k: int, n_experts: int) -> list[str]:
    """What the statistics mean for a cache and for fetching ahead, in sentences."""
    known = {(s.name, s.parameter): s for s in found}
    said = []
    if (repeats := known.get(("locality", "lag=1"))) and _known(repeats.value) is not None:
        chance = repeats.shuffled or 0.0
        local = repeats.value - chance > LOCAL
        said.append(
            f"locality: {_percent(repeats.value)} of a token's experts were among those of the "
            f"token before it, and {_percent(chance)} with the tokens shuffled: "
            + (
                "experts come back soon, and a cache gains from that"
                if local
                else "hardly more than by chance, and a cache gains from popular experts alone"
            )
        )
    if recall := known.get(("recall", f"ahead=1 fetched={top_k}")):
        said.append(
            f"recall: the next layer's gate, applied a layer early, finds "
            f"{_percent(recall.value)} of the experts that are used: the rest of what is fetched "
            "ahead is copied in vain"
        )
    half = known.get(("hit_ratio_lru", f"slots={n_experts // 2}"))
    best = known.get(("hit_ratio_belady_bypass", f"slots={n_experts // 2}"))
    if half and best:
        said.append(
            f"caching: with half of the experts in a cache, LRU hits {_percent(half.value)} and no "
            f"policy without prefetching could hit more than {_percent(best.value)}"
        )
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _shown(value: float | None) -> str:
    known = _known(value)
    return "" if known is None else f"{known:.3f}"
