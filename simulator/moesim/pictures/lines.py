"""Charts with a line for each policy: hit ratio by cache size, speed by memory and by bandwidth.

Every function takes rows as the commands print them, and returns a Vega-Lite specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepolicy.amounts import counted

from moesim.pictures.colours import LIMIT, POLICY_COLOURS, TONES, PolicyMarks

WIDTH, HEIGHT = 640, 300
MOST_LINES = 12  # more policies are bars: nobody follows more lines
EXACT, LOSSY, FUTURE = "runs live", "changes what is computed *", "knows the future"
GROUPS = {
    LIMIT: TONES["light"].ink,
    EXACT: POLICY_COLOURS["light"][0],
    LOSSY: POLICY_COLOURS["light"][1],
    FUTURE: POLICY_COLOURS["light"][2],
}
Row = Mapping[str, Any]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """A field of the rows, and what the axis says of it.

    log        of its logarithm
    whole      of whole numbers
    from_zero  begins at 0 whatever the rows are, so that lengths and heights can be compared
    """

    name: str
    title: str
    percent: bool = False
    log: bool = False
    whole: bool = False
    from_zero: bool = False


SLOTS = Axis("slots", "experts cached a layer (slots)", whole=True)
MEMORY = Axis("memory_gb", "memory for cached experts in GB")
SMALL_MEMORY = Axis("memory_mb", "memory for cached experts in MB")
BANDWIDTH = Axis("link_gb_per_s", "bandwidth of the link in GB/s", log=True)
HIT_RATIO = Axis("hit_ratio", "hit ratio", percent=True)
SPEED = Axis("tokens_per_s", "tokens/s", from_zero=True)


def with_limits(rows: Iterable[Row], x: str, y: str, limit: str) -> list[dict[str, Any]]:
    """Rows of (policy, x, y), and the limit's as one more policy: the highest of the rows' at
    each x. Rows without a number are left out."""
    kept = ("policy", "group", x, y)
    found = [{n: row[n] for n in kept if n in row} for row in rows if row[y] is not None]
    highest: dict[Any, float] = {}
    for row in rows:
        if row.get(limit) is not None:
            highest[row[x]] = max(highest.get(row[x], 0.0), row[limit])
    grouped = {"group": LIMIT} if any("group" in row for row in found) else {}
    return found + [
        {"policy": LIMIT, x: at, y: value} | grouped for at, value in sorted(highest.items())
    ]


def policy_lines(
    rows: Sequence[Row], x: Axis, y: Axis, marks: PolicyMarks, *, title: str, subtitle: str
) -> Spec:
    """A line for each policy of ``rows``, dashed for the limit. Where the rows have ``shuffled``,
    those that are of a shuffled copy are thin and dotted."""
    spec: Spec = (
        layers(rows, x, y, marks)
        .properties(width=WIDTH, height=HEIGHT, title=heading(title, subtitle))
        .to_dict()
    )
    return spec


def heading(title: str, subtitle: str) -> Any:
    """The title of a chart, and under it what its numbers are."""
    import altair as alt

    return alt.TitleParams(text=title, subtitle=subtitle.split("\n"))


def panel_title(text: str) -> Any:
    """The title of one of several charts next to each other."""
    import altair as alt

    return alt.TitleParams(text=text, fontSize=12, fontWeight="normal", offset=6)


def layers(
    rows: Sequence[Row],
    x: Axis,
    y: Axis,
    marks: PolicyMarks,
    every: Sequence[Row] = (),
    labels: Sequence[str] = (),
) -> Any:
    """The lines and points of `policy_lines`. For charts that put several next to each other:
    ``every`` has the rows of all, and ``labels`` their policies."""
    import altair as alt

    labels = labels or list(dict.fromkeys(str(row["policy"]) for row in rows))
    every = every or rows
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows])).encode(
        x=axis_of(alt.X, x, every), y=axis_of(alt.Y, y, every), color=colour_of(labels, marks)
    )
    has_copy = any("shuffled" in row for row in rows)
    of_trace = base.transform_filter("!datum.shuffled") if has_copy else base
    dash = (
        alt.when(f"datum.policy == '{LIMIT}'").then(alt.value([6, 4])).otherwise(alt.value([1, 0]))
    )
    parts = [of_trace.mark_line(strokeWidth=2).encode(strokeDash=dash)]
    if has_copy:
        copy = base.transform_filter("datum.shuffled")
        parts.insert(0, copy.mark_line(strokeWidth=1.3, strokeDash=[2, 3], opacity=0.9))
    shape = alt.Shape("policy:N").scale(domain=labels, range=[marks.shape[one] for one in labels])
    points = of_trace.mark_point(filled=True, size=55, opacity=1)
    parts.append(points.encode(shape=shape.title(None)))
    return alt.layer(*parts)


def _group_colours(rows: Sequence[Row]) -> Any:
    import altair as alt

    there = [name for name in GROUPS if any(row.get("group") == name for row in rows)]
    scale = alt.Scale(domain=there, range=[GROUPS[name] for name in there])
    return alt.Color("group:N").title(None).scale(scale)


def colour_of(labels: Sequence[str], marks: PolicyMarks) -> Any:
    """The encoding of colours by policy."""
    import altair as alt

    scale = alt.Scale(domain=list(labels), range=[marks.colour[each] for each in labels])
    return alt.Color("policy:N").scale(scale).title(None)


def axis_of(kind: Any, axis: Axis, rows: Sequence[Row] = ()) -> Any:
    """The encoding of an axis; ``kind`` is altair's X or Y.

    It begins at 0, but where that is not required (``from_zero``) and all of ``rows`` are in the
    upper half: then the lines would be one.
    """
    import altair as alt

    found = kind(f"{axis.name}:Q").title(axis.title)
    if axis.log:
        at = sorted({row[axis.name] for row in rows})
        scale = alt.Scale(type="log", nice=False)
        return found.scale(scale).axis(alt.Axis(grid=False, format=".3~g", values=at))
    if axis.whole:
        scale = alt.Scale(zero=False, nice=False, padding=8)
        return found.scale(scale).axis(alt.Axis(format="d", tickMinStep=1, grid=False))
    values = [row[axis.name] for row in rows]
    zero = axis.from_zero or not values or min(values) < 0.5 * max(values)
    found = found.scale(zero=zero)
    return found.axis(format=".0%" if axis.percent else ",~f")


def facets(
    panels: Mapping[str, Sequence[Row]],
    x: Axis,
    y: Axis,
    marks: PolicyMarks,
    *,
    title: str,
    subtitle: str,
) -> Spec:
    """`policy_lines` for each of several settings, three to a line and with the same axes."""
    import altair as alt

    width = WIDTH if len(panels) == 1 else 300 if len(panels) == 2 else 230
    every = [row for rows in panels.values() for row in rows]
    labels = list(dict.fromkeys(str(row["policy"]) for row in every))
    charts = [
        layers(rows, x, y, marks, every, labels).properties(
            width=width, height=HEIGHT if len(panels) == 1 else 200, title=panel_title(name)
        )
        for name, rows in panels.items()
    ]
    spec: Spec = (
        alt.concat(*charts, columns=2 if len(charts) in (2, 4) else 3)
        .resolve_scale(x="shared", y="shared")
        .properties(title=heading(title, subtitle))
        .to_dict()
    )
    return spec


def policy_bars(
    rows: Sequence[Row], y: Axis, marks: PolicyMarks, *, title: str, subtitle: str
) -> Spec:
    """A bar for each policy, the longest first and the limit above, a panel for each number of
    slots. For policies that are too many for lines, and for one size of the cache.

    Of very many policies the colour says their ``group`` (see `GROUPS`).
    """
    import altair as alt

    panels = []
    sizes = list(dict.fromkeys(row["slots"] for row in rows))
    for slots in sizes:
        here = [dict(row) for row in rows if row["slots"] == slots]
        panels.append(
            _bars(here, y, marks, f"{counted(slots, 'slot')} a layer" if len(sizes) > 1 else None)
        )
    spec: Spec = (
        alt.hconcat(*panels)
        .properties(title=heading(title, subtitle))
        .resolve_scale(x="shared")
        .to_dict()
    )
    return spec


def _bars(rows: list[dict[str, Any]], y: Axis, marks: PolicyMarks, name: str | None) -> Any:
    import altair as alt

    rows = sorted(rows, key=lambda row: (row["policy"] != LIMIT, -row[y.name]))
    order = [row["policy"] for row in rows]
    many = len(rows) > MOST_LINES
    width = WIDTH if name is None else 250
    form = ".0%" if y.percent else ",~f"
    across = alt.X(f"{y.name}:Q").title(y.title).axis(format=form, tickCount=max(3, width // 70))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("policy:N").sort(order).title(None).axis(labelLimit=260, grid=False)
    )
    colours = _group_colours(rows) if many else colour_of(order, marks).legend(None)
    bars = base.mark_bar(height={"band": 0.7}).encode(x=across, color=colours)
    # In a column of their own, where no bar ends.
    text = base.mark_text(align="left", color=TONES["light"].ink, fontSize=10, aria=False).encode(
        x=alt.value(width + 8), text=alt.Text(f"{y.name}:Q", format=_number(y))
    )
    height = max(60, (14 if many else 24) * len(rows))
    drawn = alt.layer(bars, text).properties(width=width, height=height)
    return drawn if name is None else drawn.properties(title=panel_title(name))


def _number(axis: Axis) -> str:
    return ".1%" if axis.percent else ".2f"
