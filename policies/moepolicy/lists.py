"""Several values in one option: separated by commas, blanks or both."""

from __future__ import annotations

import re

from moepolicy.console import CommandUsageError


def names(text: str | None) -> list[str]:
    """The values of "a, b c"; none of None."""
    return [part for part in re.split(r"[,\s]+", text or "") if part]


def amounts(text: str | None) -> list[str]:
    """The values of "4 GiB,8GiB", in which blanks separate nothing; none of None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(text: str | None, option: str) -> list[int] | None:
    """The whole numbers of "2,4,6", which are no sizes below 0; None of None.

    Raises CommandUsageError that names ``option``.
    """
    if text is None:
        return None
    try:
        found = [int(part) for part in names(text)]
    except ValueError:
        found = []
    if not found:
        raise CommandUsageError(f"{option} is '{text}', not whole numbers such as 2,4,6")
    if min(found) < 0:
        raise CommandUsageError(f"{option} is '{text}': give numbers of 0 or more")
    return found


def policies(text: str) -> list[str]:
    """The specs of "lru, lru-spec:n=1,horizon=2 mine.py:Mine": what follows a comma and sets a
    parameter belongs to the spec before it."""
    found: list[str] = []
    depth = 0
    for part in re.split(r"([,\s]+)", text.strip()):
        mark = not part.strip(", \t\n")
        parameter = bool(re.match(r"[A-Za-z_]\w*=", part))
        if found and (depth or (parameter and ":" in found[-1]) or (mark and part)):
            found[-1] += part
        elif part and not mark:
            found.append(part)
        depth += part.count("(") - part.count(")")
    return [re.sub(r"[,\s]+$", "", one) for one in found]
