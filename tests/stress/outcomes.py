"""How one job of a campaign ended."""

from __future__ import annotations

from dataclasses import dataclass

READ, REFUSED, RAN = "read", "refused", "ran"
TRACEBACK, LEFT, WILD, CODE, UNCLEAR = "traceback", "left", "wild", "ran code", "unclear"
BROKEN, WRONG = "broken case", "wrong"
GOOD = (READ, RAN, REFUSED)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``told`` is its error, or what is wrong."""

    case: str
    number: int
    outcome: str
    told: str = ""
