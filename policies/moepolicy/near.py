"""Which name was meant by one that is not there; nothing is suggested where none is near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile

NEARLY_ALL = 0.7
"""Of two names' letters, the share that stand in both in the same order (difflib's ratio)."""
SHORTEST_PART = 3
"""Letters: a name's beginning that stands for the whole has as many at least."""


def near(name: str, choices: Iterable[str]) -> str | None:
    """The choice that ``name`` is a misspelling, another case or the beginning of, or None.

    A choice is near with one slip (a letter more, less, other, or two swapped), with most letters
    alike, or where one of the two names begins with the other. Dashes in front do not count: they
    would make every option resemble every other.
    """
    typed = _plain(name)
    best: tuple[float, str] | None = None
    for choice in sorted(choices):
        known = _plain(choice)
        alike = difflib.SequenceMatcher(None, known, typed).ratio()
        if alike < NEARLY_ALL and not (_one_slip(typed, known) or _begins(typed, known)):
            continue
        if best is None or alike >= best[0]:  # of equals the last, as 4bit for 5bit
            best = (alike, choice)
    return best[1] if best else None


def meant(name: str, choices: Iterable[str]) -> str:
    """The words "did you mean 'x'? " for the choice near ``name``, or none."""
    found = near(name, choices)
    return f"did you mean '{found}'? " if found is not None else ""


def _plain(name: str) -> str:
    return name.casefold().lstrip("-")


def _begins(typed: str, known: str) -> bool:
    shorter, longer = sorted((typed, known), key=len)
    return len(shorter) >= SHORTEST_PART and longer.startswith(shorter)


def _one_slip(typed: str, known: str) -> bool:
    """Whether two names of two letters or more differ by one letter, or by two that are swapped."""
    if min(len(typed), len(known)) < 2:
        return False
    start = _common(typed, known)
    one, other = typed[start:], known[start:]
    end = _common(one[::-1], other[::-1])
    one, other = one[: len(one) - end], other[: len(other) - end]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


def _common(one: str, other: str) -> int:
    """How many letters both begin with."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))
