"""The charts of `moesim compare`, `curve` and `sweep`, from the rows that these print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moepolicy.lossy import marked

from moesim.errors import SimulationError
from moesim.pictures.colours import LIMIT, PolicyMarks
from moesim.pictures.lines import (
    EXACT,
    FUTURE,
    HIT_RATIO,
    LOSSY,
    MOST_LINES,
    SLOTS,
    SPEED,
    Axis,
    Row,
    Spec,
    facets,
    policy_bars,
    policy_lines,
    with_limits,
)
from moesim.reading import needs_future

MOST_PANELS = 12
# What a sweep's points may differ in besides policy and slots, as a panel's title has it.
SETTINGS = ("trace_path", "machine", "precision", "expert_bytes", "scope", "memory_bytes")


def compared(rows: Sequence[Row], kind: str, where: str) -> Spec:
    """Of a comparison's rows: tokens/s by slots, or a bar for each policy where lines would be
    too many or points. Hit ratios where nothing tells times. SimulationError without a result."""
    ran = [_marked(row) for row in rows if row["hit_ratio"] is not None]
    if not ran:
        raise SimulationError("no policy could run: there is nothing to draw")
    marks = PolicyMarks.of(row["policy"] for row in ran)
    axis = SPEED if all(row["tokens_per_s"] is not None for row in ran) else HIT_RATIO
    limit = "limit_tokens_per_s" if axis is SPEED else "limit_hit_ratio"
    if axis is HIT_RATIO:
        ran = [row | {limit: _most_hits(row)} for row in ran]
    values = with_limits(ran, SLOTS.name, axis.name, limit)
    what = "Speed" if axis is SPEED else "Hit ratio"
    about = {"title": f"{what} by policy", "subtitle": f"{kind}; {where}"}
    sizes = {row["slots"] for row in ran}
    if len(sizes) == 1:
        about["subtitle"] += f"; {sizes.pop()} slots a layer"
        return policy_bars(values, axis, marks, **about)
    if len(marks.colour) - 1 > MOST_LINES:
        return policy_bars(values, axis, marks, **about)
    return policy_lines(values, SLOTS, axis, marks, **about)


def _marked(row: Row) -> dict[str, Any]:
    """The row with its policy's label as tables print it, and the group that the policy is of."""
    group = LOSSY if row["lossy"] else FUTURE if needs_future(row["policy"]) else EXACT
    return dict(row) | {"policy": marked(row["policy"], row["lossy"]), "group": group}


def _most_hits(row: Row) -> float | None:
    """The limit's hit ratio without prefetching and bypassing."""
    kept = row["limit_loads_kept"]
    return None if kept is None else 1 - kept / row["requests"]


def curves(rows: Sequence[Row], kind: str, where: str) -> Spec:
    """Of a curve's rows: the hit ratio of each size, and dotted that of the shuffled copy."""
    ran = [row for row in rows if row["hit_ratio"] is not None]
    values: list[dict[str, Any]] = []
    for shuffled in (False, True):
        before = "shuffled_" if shuffled else ""
        values += [
            {"policy": row["policy"], "slots": row["slots"], "shuffled": shuffled}
            | {"hit_ratio": row[f"{before}hit_ratio"]}
            for row in ran
        ]
        limits = {row["slots"]: row[f"{before}limit_hit_ratio"] for row in ran}
        values += [
            {"policy": LIMIT, "slots": slots, "shuffled": shuffled, "hit_ratio": ratio}
            for slots, ratio in limits.items()
        ]
    marks = PolicyMarks.of(row["policy"] for row in ran)
    return policy_lines(
        values,
        SLOTS,
        HIT_RATIO,
        marks,
        title="Hit ratio by cache size",
        subtitle=f"{kind}; {where}; dotted: the same tokens in random order",
    )


def swept(rows: Sequence[Row]) -> Spec:
    """Of a sweep's points: tokens/s (hits where nothing tells times) by slots, a panel for each
    setting. SimulationError where that would be too many panels or nothing."""
    ran = [_marked(row) for row in rows if row["status"] == "ok"]
    if not ran:
        raise SimulationError("no point of the sweep ran: there is nothing to draw")
    varied = [name for name in SETTINGS if len({row[name] for row in ran}) > 1]
    by_memory = "memory_bytes" in varied
    varied = [name for name in varied if name != "memory_bytes"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ran:
        groups.setdefault(tuple(row[name] for name in varied), []).append(row)
    if len(groups) > MOST_PANELS:
        raise SimulationError(
            f"the sweep has {len(groups)} settings ({', '.join(varied)}), and a picture at most "
            f"{MOST_PANELS} panels: plot a part of the grid"
        )
    timed = all(row["tokens_per_s"] is not None for row in ran)
    y = SPEED if timed else HIT_RATIO
    x = Axis("memory_gb", "memory for slots and staging in GB") if by_memory else SLOTS
    panels = {}
    for setting, group in groups.items():
        title = ", ".join(str(value) for value in setting if value is not None)
        points = [
            dict(row)
            | {"memory_gb": (row["memory_bytes"] or 0) / 1e9}
            | {"limit": row["limit_tokens_per_s"] if timed else None}
            for row in group
        ]
        panels[title] = with_limits(points, x.name, y.name, "limit")
    marks = PolicyMarks.of(row["policy"] for row in ran)
    if len(marks.colour) - 1 > MOST_LINES:
        raise SimulationError(
            f"the sweep has {len(marks.colour) - 1} policies, and a panel at most {MOST_LINES} "
            "lines: plot a part of the grid"
        )
    sources = sorted({_kind(row) for row in ran})
    what = "Speed" if timed else "Hit ratio"
    fixed = [str(ran[0][name]) for name in ("machine", "precision") if ran[0][name] is not None]
    traces = {row["trace"] for row in ran}
    sources += sorted(traces) if len(traces) == 1 else []
    where = "; ".join([*sources, *(fixed if not varied else [])])
    return facets(panels, x, y, marks, title=f"{what} by policy", subtitle=where)


def _kind(row: Row) -> str:
    return "simulated, synthetic routing" if "(synthetic)" in row["trace"] else "simulated"
