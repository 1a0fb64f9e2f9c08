"""Charts of what a trace says by itself: use of experts, locality, recall of predictions."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.pictures.colours import POLICY_COLOURS, TONES
from moesim.pictures.lines import HEIGHT, WIDTH, Row, Spec, heading

RECORDED, SHUFFLED = "as recorded", "tokens shuffled"
LABELLED = 1024  # cells of a heat map that have values under the pointer: more make a big file


def heat_map(rows: Sequence[Row], *, title: str, subtitle: str) -> Spec:
    """The share of a layer's uses that each expert has; rows of layer, expert and share."""
    import altair as alt

    ramp = TONES["light"].ramp
    n_layers = 1 + max(row["layer"] for row in rows)
    n_experts = 1 + max(row["expert"] for row in rows)
    top = max(row["share"] for row in rows)
    legend = alt.Legend(format=".1%", title="share of the layer's uses", orient="bottom")
    legend = alt.Legend(**(legend.to_dict() | {"direction": "horizontal", "symbolType": "square"}))
    side = min(22, max(5, 640 / n_experts))
    spec: Spec = (
        alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
        .mark_rect(aria=len(rows) <= LABELLED)
        .encode(
            x=alt.X("expert:O").title("expert").axis(labelAngle=0, labelOverlap=True, ticks=False),
            y=alt.Y("layer:O").title("layer").axis(labelOverlap=True, ticks=False),
            color=alt.Color("share:Q")
            .scale(type="quantize", domain=[0, top], range=list(ramp))
            .legend(legend),
        )
        .properties(
            width=round(max(side * n_experts, 420)),
            height=round(max(min(18, max(6, 420 / n_layers)) * n_layers, 90)),
            title=heading(title, subtitle),
        )
        .to_dict()
    )
    return spec


def locality_chart(rows: Sequence[Row], *, title: str, subtitle: str) -> Spec:
    """How often an expert is one of those so many tokens earlier; rows of lag, copy, share."""
    return _two_lines(
        rows,
        ("lag", "tokens back", "log"),
        ("share", "share of uses that repeat"),
        "copy",
        title,
        subtitle,
    )


def recall_chart(rows: Sequence[Row], *, title: str, subtitle: str) -> Spec:
    """The share of a layer's experts that are among the likeliest ones of a prediction, by how
    many are fetched and how many layers ahead: the right half of Figure 2 of arXiv 2312.17238."""
    return _two_lines(
        rows,
        ("fetched", "experts fetched ahead", "linear"),
        ("recall", "share of used experts fetched"),
        "ahead",
        title,
        subtitle,
    )


def _two_lines(
    rows: Sequence[Row],
    x: tuple[str, str, str],
    y: tuple[str, str],
    series: str,
    title: str,
    subtitle: str,
) -> Spec:
    import altair as alt

    names = list(dict.fromkeys(str(row[series]) for row in rows))
    colours = [POLICY_COLOURS["light"][place % 7] for place in (0, 1, 2, 3, 4, 5, 6)]
    if SHUFFLED in names:
        colours = [POLICY_COLOURS["light"][0], TONES["light"].faint]
    across = alt.X(f"{x[0]}:Q").title(x[1])
    scale = alt.Scale(type="log", base=2) if x[2] == "log" else alt.Scale(zero=False, nice=False)
    across = across.scale(scale).axis(
        values=sorted({row[x[0]] for row in rows}), format="d", grid=False
    )
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows])).encode(
        x=across,
        y=alt.Y(f"{y[0]}:Q").title(y[1]).scale(zero=True).axis(format=".0%"),
        color=alt.Color(f"{series}:N").title(None).scale(domain=names, range=colours[: len(names)]),
        shape=alt.Shape(f"{series}:N").title(None).scale(domain=names),
    )
    drawn = base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=55, opacity=1)
    spec: Spec = drawn.properties(
        width=WIDTH, height=round(0.8 * HEIGHT), title=heading(title, subtitle)
    ).to_dict()
    return spec


__all__ = ["heat_map", "locality_chart", "recall_chart"]
