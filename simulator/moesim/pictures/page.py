"""A page of HTML that holds its pictures and their numbers, and opens without a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from moesim.pictures.colours import TONES
from moesim.pictures.drawing import FONT, svg, svg_rules
from moesim.pictures.lines import Row, Spec

MOST_ROWS = 400  # of a table under a picture: a longer one is in the file of its numbers only


@dataclass(frozen=True)
class Figure:
    """A picture with its numbers.

    name     of its files, if it gets any
    kind     what its numbers are: "simulated", "recorded", "synthetic" and the like
    caption  what there is to see, and what was left out
    rows     the numbers that are drawn
    """

    name: str
    heading: str
    kind: str
    caption: str
    chart: Spec
    rows: Sequence[Row]


@dataclass(frozen=True)
class Page:
    """A report: what it says first, its figures, and a table in plain text at the end."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    table: str
    notes: Sequence[str] = field(default_factory=tuple)

    def html(self) -> str:
        """The whole document."""
        facts = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in self.facts
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        contents = "".join(
            f'<li><a href="#{one.name}">{escape(one.heading)}</a></li>' for one in self.figures
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
            f'<main>\n<h1>{escape(self.title)}</h1>\n<p class="lead">{escape(self.lead)}</p>\n'
            f"<dl>{facts}</dl>\n<nav><ol>{contents}</ol></nav>\n"
            + "\n".join(map(_figure, self.figures))
            + '\n<h2 id="table">All numbers of the comparison</h2>\n'
            + f"<pre>{escape(self.table)}</pre>\n"
            + (f"<h2>Notes</h2>\n<ul>{notes}</ul>\n" if notes else "")
            + "</main>\n</body>\n</html>\n"
        )


def _figure(one: Figure) -> str:
    kind = f'<span class="kind">{escape(one.kind)}</span>'
    return (
        f'<section id="{one.name}">\n<h2>{escape(one.heading)} {kind}</h2>\n'
        f'<p class="of">{escape(_subtitle(one))}</p>'
        f"<figure>{_unique(svg(_untitled(one.chart)), one.name)}"
        f"<figcaption>{escape(one.caption)}</figcaption></figure>\n{_numbers(one.rows)}</section>"
    )


def _subtitle(one: Figure) -> str:
    """The chart's subtitle without what the heading says already."""
    return " ".join(one.chart["title"]["subtitle"]).removeprefix(one.kind).lstrip("; ")


def _untitled(chart: Spec) -> Spec:
    """The chart without the title that the page has above it."""
    return {name: part for name, part in chart.items() if name != "title"}


def _unique(drawn: str, name: str) -> str:
    """Ids within the page's one document must differ from picture to picture."""
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', drawn)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", drawn)


def _numbers(rows: Sequence[Row]) -> str:
    """The rows as a table that opens on demand."""
    if len(rows) > MOST_ROWS:
        return (
            f'<p class="more">{len(rows):,} numbers: too many for a table here; '
            "--pictures FOLDER writes them as CSV.</p>\n"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in names) + "</tr>"
        for row in rows
    )
    return (
        f"<details><summary>The numbers</summary><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></details>\n"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _style() -> str:
    light, dark = TONES["light"], TONES["dark"]
    names = ("page", "ink", "faint", "line", "grid")

    def variables(tones: Any) -> str:
        return "".join(f"--{name}:{getattr(tones, name)};" for name in names)

    return (
        f":root{{{variables(light)}}}"
        "@media screen and (prefers-color-scheme:dark){:root{" + variables(dark) + "}}"
        f"body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 {FONT}}}"
        "main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}"
        "h1{font-size:1.6rem;line-height:1.25;margin:0 0 .6rem;overflow-wrap:anywhere}"
        "h2{font-size:1.15rem;margin:2.6rem 0 .4rem}"
        ".lead{font-size:1.05rem;max-width:46rem}"
        ".kind{font-size:.75rem;font-weight:normal;color:var(--faint);border:1px solid var(--line);"
        "border-radius:.7rem;padding:.1rem .6rem;margin-left:.5rem;white-space:nowrap}"
        "dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:1.2rem 0;"
        "font-size:.88rem}dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}"
        "nav{font-size:.88rem}nav ol{columns:2;padding-left:1.4rem}a{color:inherit}"
        ".of{color:var(--faint);font-size:.82rem;margin:0 0 .6rem}figure{margin:0;overflow-x:auto}"
        "figure svg{max-width:100%;height:auto;display:block}"
        "figcaption{max-width:46rem;color:var(--faint);font-size:.88rem;margin:.3rem 0 .5rem}"
        "details{font-size:.85rem}summary{cursor:pointer;color:var(--faint)}"
        "details table{border-collapse:collapse;margin:.5rem 0;display:block;overflow-x:auto;"
        "max-height:24rem}"
        "th,td{text-align:right;padding:.1rem .7rem;border-bottom:1px solid var(--grid);"
        "font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}"
        "pre{overflow-x:auto;font-size:.78rem;line-height:1.4;font-family:'DejaVu Sans Mono',"
        "Menlo,Consolas,monospace}.more,ul{font-size:.85rem;color:var(--faint)}"
        "@media screen{figure svg{min-width:32rem}}"
        "@media print{main{max-width:none;padding:0}section{break-inside:avoid}details,nav,.more"
        "{display:none}pre{white-space:pre-wrap}}" + svg_rules("figure svg ")
    )
