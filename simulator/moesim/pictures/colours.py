"""Colours that all pictures share: one for a policy throughout, for light and for dark pages.

The seven colours of a theme differ by 0.13 or more in OKLab for normal vision and for protanopia,
deuteranopia and tritanopia (Machado et al. 2009, severity 1), and have a contrast of 3:1 or more to
the page (WCAG 2.2, 1.4.11). Their order in the two themes is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

POLICY_COLOURS = {
    "light": ("#0643C0", "#9C5207", "#048E88", "#633945", "#969909", "#171463", "#E15CE5"),
    "dark": ("#4FCEFF", "#E96A22", "#01AC95", "#9D4685", "#C5FF00", "#474EFF", "#F2C7A1"),
}
# The policies that most tables have keep their colours from one command to another.
OWN = {"lru": 0, "lfu": 1, "lru-spec": 2, "belady": 3, "belady-bypass": 4, "clairvoyant": 5}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
LIMIT = "limit"
# The limit's points, two dashes: its line is dashed, and so is its mark in the legend.
DASHES = "M-1,-0.12L-0.3,-0.12L-0.3,0.12L-1,0.12ZM0.3,-0.12L1,-0.12L1,0.12L0.3,0.12Z"


@dataclass(frozen=True)
class Tones:
    """What is not a policy's: the page, text, lines, and a ramp from none to most."""

    page: str
    ink: str  # text, and what bounds all policies
    faint: str  # less important text
    line: str  # axes
    grid: str
    ramp: tuple[str, ...]


TONES = {
    "light": Tones(
        page="#FFFFFF",
        ink="#1F2429",
        faint="#59616A",
        line="#868E97",
        grid="#E4E7EB",
        ramp=(
            "#F4F7FC",
            "#DCE7F6",
            "#BFD3EE",
            "#9ABCE3",
            "#719FD5",
            "#4A80C2",
            "#2A61A8",
            "#134488",
            "#062A5E",
        ),
    ),
    "dark": Tones(
        page="#15181C",
        ink="#E9ECEF",
        faint="#A3ABB4",
        line="#7B848D",
        grid="#2C3238",
        ramp=(
            "#1B2026",
            "#1D2E42",
            "#1F3F61",
            "#225383",
            "#2B6BA6",
            "#4486C4",
            "#6BA4DC",
            "#9CC5EF",
            "#D6E8FB",
        ),
    ),
}


def dark_of() -> dict[str, str]:
    """The dark theme's colour for each of the light one's."""
    light, dark = TONES["light"], TONES["dark"]
    pairs = dict(zip(POLICY_COLOURS["light"], POLICY_COLOURS["dark"], strict=True))
    pairs |= dict(zip(light.ramp, dark.ramp, strict=True))
    return pairs | {
        getattr(light, name): getattr(dark, name)
        for name in ("page", "ink", "faint", "line", "grid")
    }


@dataclass(frozen=True)
class PolicyMarks:
    """The colour and the shape of the points of each of some policies, for all of their pictures.

    Past seven policies colours come again, with other shapes.
    """

    colour: Mapping[str, str]  # by label, of the light theme
    shape: Mapping[str, str]

    @classmethod
    def of(cls, policies: Iterable[str]) -> PolicyMarks:
        """Of the labels of policies, in their order; the limit is drawn in the text's colour."""
        colours = POLICY_COLOURS["light"]
        labels = [name for name in dict.fromkeys(policies) if name != LIMIT]
        found = {name: OWN[name] for name in labels if name in OWN}
        free = [place for place in range(len(colours)) if place not in found.values()]
        others = [name for name in labels if name not in OWN]
        for number, name in enumerate(others):
            # Every colour once before any comes again.
            again = (number - len(free)) % len(colours)
            found[name] = free[number] if number < len(free) else again
        ordered = {name: found[name] for name in labels}
        seen: dict[int, int] = {}
        shapes = {}
        for name, place in ordered.items():
            times = seen[place] = seen.get(place, -1) + 1
            shapes[name] = SHAPES[(place + times) % len(SHAPES)]
        colour = {name: colours[place] for name, place in ordered.items()}
        ink = TONES["light"].ink
        return cls(colour | {LIMIT: ink}, shapes | {LIMIT: DASHES})
