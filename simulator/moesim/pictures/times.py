"""Charts of simulated time: what a token's consists of, and what every lane did when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.pictures.colours import POLICY_COLOURS, TONES
from moesim.pictures.lines import WIDTH, Row, Spec, heading, panel_title

_BLUE, _BROWN, _TEAL = POLICY_COLOURS["light"][:3]
# The parts of a token's time in the order in which they are stacked.
DENSE, EXPERTS, STALL = "layers and gates", "experts", "waiting for experts"
DEMAND, PREFETCH, READING = "copy on demand", "copy ahead", "read from disk"
PARTS = {DENSE: TONES["light"].line, EXPERTS: _TEAL, STALL: _BROWN}
DONE = {DENSE: TONES["light"].line, EXPERTS: _TEAL, DEMAND: _BROWN, PREFETCH: _BLUE}
DONE |= {READING: POLICY_COLOURS["light"][3]}


def time_parts(rows: Sequence[Row], *, title: str, subtitle: str) -> Spec:
    """A bar for each policy, stacked: the milliseconds of a token by part; rows of policy, part
    and ms_per_token."""
    import altair as alt

    policies = list(dict.fromkeys(row["policy"] for row in rows))
    order = {part: place for place, part in enumerate(PARTS)}
    values = [dict(row) | {"order": order[row["part"]]} for row in rows]
    spec: Spec = (
        alt.Chart(alt.InlineData(values=values))
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X("ms_per_token:Q").title("ms a token"),
            y=alt.Y("policy:N").sort(policies).title(None).axis(labelLimit=260, grid=False),
            color=_filled("part", PARTS, PARTS),
            order=alt.Order("order:Q"),
        )
        .properties(width=WIDTH, height=28 * len(policies), title=heading(title, subtitle))
        .to_dict()
    )
    return spec


def timeline(rows: Sequence[Row], *, title: str, subtitle: str) -> Spec:
    """What compute, copy streams, disk and CPU workers did; rows of policy, lane, what, begin_ms
    and end_ms. A panel for each policy; gaps of the lane of compute are waiting."""
    import altair as alt

    policies = list(dict.fromkeys(row["policy"] for row in rows))
    latest = max(row["end_ms"] for row in rows)
    there = [what for what in DONE if any(row["what"] == what for row in rows)]
    panels: list[Any] = []
    for policy in policies:
        values = [dict(row) for row in rows if row["policy"] == policy]
        lanes = sorted({row["lane"] for row in values}, key=_lane_order)
        last = policy == policies[-1]
        panels.append(
            alt.Chart(alt.InlineData(values=values))
            .mark_rect(aria=len(rows) <= 2000)
            .encode(
                x=alt.X("begin_ms:Q")
                .scale(domain=[0, latest], nice=False)
                .title("simulated ms" if last else None)
                .axis(grid=False),
                x2="end_ms:Q",
                y=alt.Y("lane:N").sort(lanes).title(None).axis(grid=False, ticks=False),
                color=_filled("what", DONE, there),
            )
            .properties(width=720, height=26 * len(lanes), title=panel_title(policy))
        )
    spec: Spec = (
        alt.vconcat(*panels, spacing=14).properties(title=heading(title, subtitle)).to_dict()
    )
    return spec


def _filled(field: str, colours: dict[str, str], there: Any) -> Any:
    import altair as alt

    names = list(there)
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    return (
        alt.Color(f"{field}:N").title(None).scale(scale).legend(orient="top", symbolType="square")
    )


def _lane_order(lane: str) -> tuple[int, str]:
    first = ("compute", "copy", "disk", "CPU")
    return next((i for i, name in enumerate(first) if lane.startswith(name)), len(first)), lane
