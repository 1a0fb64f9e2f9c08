"""Charts as SVG, PNG and PDF, drawn by vl-convert without a browser or a network."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from typing import Any

from moepolicy.outputs import check_free, check_suffix, written_whole

from moesim.errors import SimulationError
from moesim.pictures.colours import POLICY_COLOURS, TONES, dark_of

SUFFIXES = (".svg", ".png", ".pdf", ".html")
SCALE = 2.0  # pixels of a PNG for one of the chart
FONT = "DejaVu Sans, Verdana, sans-serif"
EXTRA = "pictures need altair and vl-convert-python: pip install 'moe-offload-lab[plots]'"
_LABELLED = re.compile(r'<(path|text) aria-label="([^"]*)"([^>]*?)(/>|></\1>)')


def require_plots() -> None:
    """SimulationError that names the extra where what draws is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
        raise SimulationError(EXTRA)


def check_picture(path: Path | None, *, force: bool, what: str = "--plot") -> None:
    """Raise CommandError or SimulationError where no picture can be written to ``path``: call it
    before the work."""
    if path is None:
        return
    check_suffix(path, SUFFIXES, what)
    check_free(path, force=force, what=what)
    require_plots()


def theme(*, dark: bool = False) -> dict[str, Any]:
    """The Vega configuration of all charts."""
    tones = TONES["dark" if dark else "light"]
    text: dict[str, Any] = {"labelColor": tones.faint, "titleColor": tones.ink, "labelFont": FONT}
    text |= {"titleFont": FONT, "titleFontWeight": "normal", "titleFontSize": 12}
    return {
        "background": tones.page,
        "font": FONT,
        "view": {"stroke": None},
        "axis": text
        | {
            "domainColor": tones.line,
            "tickColor": tones.line,
            "gridColor": tones.grid,
            "labelFontSize": 11,
            "titlePadding": 8,
            "tickSize": 4,
            "labelFlush": False,  # the first and the last label under their ticks, too
        },
        "legend": text | {"labelFontSize": 11, "symbolSize": 70, "labelLimit": 220},
        "header": text | {"labelFontSize": 12, "labelColor": tones.ink},
        "title": {"color": tones.ink, "font": FONT, "subtitleColor": tones.faint}
        | {"subtitleFont": FONT, "fontSize": 14, "subtitleFontSize": 11, "anchor": "start"}
        | {"fontWeight": 600, "subtitlePadding": 4, "offset": 12},
    }


def svg(chart: dict[str, Any]) -> str:
    """A chart (a Vega-Lite specification) as SVG in the light theme's colours.

    A mark's values are its <title>, which a browser shows under the pointer.
    """
    import vl_convert

    shape = str(vl_convert.vegalite_to_svg(chart, config=theme()))
    return _LABELLED.sub(_titled, shape)


def _titled(found: re.Match[str]) -> str:
    name, label, rest = found[1], found[2], found[3]
    if "role-axis" in rest or 'aria-roledescription="axis"' in rest:
        return found[0]
    return f'<{name} aria-label="{label}"{rest}><title>{label}</title></{name}>'


def svg_rules(within: str = "") -> str:
    """CSS that shows a light chart in the dark theme's colours.

    The colours are attributes of the SVG, which any rule overrides, so that a program that knows
    no CSS draws the light chart. ``within`` is a selector that comes first.
    """
    rules = []
    for light, dark in dark_of().items():
        for attribute in ("fill", "stroke"):
            # The attribute has the letters as they were given, or as Vega writes them.
            names = (f'{within}[{attribute}="{each}"]' for each in (light, light.lower()))
            rules.append(f"{','.join(names)}{{{attribute}:{dark}}}")
    return "@media screen and (prefers-color-scheme:dark){" + "".join(rules) + "}"


def write_picture(path: Path, chart: dict[str, Any], title: str, *, dark: bool = False) -> None:
    """Write a chart whole, in the format of the suffix of ``path``.

    SVG and HTML follow what their reader prefers, light or dark; PNG and PDF are light unless
    ``dark``.
    """
    suffix = check_suffix(path, SUFFIXES, "--plot")
    with written_whole(path) as partial:
        partial.write_bytes(drawn(suffix, chart, title, dark=dark))


def drawn(suffix: str, chart: dict[str, Any], title: str, *, dark: bool = False) -> bytes:
    """A chart as a file of that suffix holds it (see `write_picture`)."""
    import vl_convert

    if suffix in (".svg", ".html"):
        shape = svg(chart)
        if suffix == ".html":
            style = "body{margin:2rem}svg{max-width:100%;height:auto}"
            style += "@media screen and (prefers-color-scheme:dark){body{background:"
            style += f"{TONES['dark'].page}}}}}{svg_rules()}"
            return (
                f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
                f"</title><style>{style}</style><body>{shape}</body></html>\n"
            ).encode()
        end = shape.index(">") + 1
        return (shape[:end] + f"<style>{svg_rules()}</style>" + shape[end:]).encode()
    shown = in_dark(chart) if dark else chart
    config = theme(dark=dark)
    if suffix == ".pdf":
        return bytes(vl_convert.vegalite_to_pdf(shown, config=config))
    return bytes(vl_convert.vegalite_to_png(shown, config=config, scale=SCALE))


def in_dark(chart: Any) -> Any:
    """A chart with every colour of the light theme replaced by the dark theme's."""
    dark = dark_of()
    if isinstance(chart, dict):
        return {name: in_dark(value) for name, value in chart.items()}
    if isinstance(chart, list):
        return [in_dark(value) for value in chart]
    return dark.get(chart, chart) if isinstance(chart, str) else chart


__all__ = ["POLICY_COLOURS", "check_picture", "require_plots", "svg", "svg_rules", "write_picture"]
