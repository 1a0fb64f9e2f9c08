"""Rows of policies that could not run: empty but for what was asked for, and the reason.

Every report keeps such rows among the others, so that no policy is missing without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

REFUSED = "refused"  # the column of the reason; None in the rows of what ran
Refusals = dict[str, str]
"""By a policy's label, why it could not run."""


def empty_row(columns: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """A row with all of ``columns`` in their order, None in those that ``known`` does not have."""
    return {**dict.fromkeys(columns), **known}


def ran(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of what ran, with the column of the reason."""
    return {**row, REFUSED: None}


def refused_row(columns: Iterable[str], known: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The row of what could not run: ``known`` is what was asked for; see `empty_row`."""
    return {**empty_row(columns, known), REFUSED: reason}


def with_refused(rows: list[dict[str, Any]], refused: Refusals) -> list[dict[str, Any]]:
    """Rows for programs, and after them a row for each policy in ``refused``."""
    names = rows[0] if rows else ("policy",)
    empty = [refused_row(names, {"policy": label}, why) for label, why in refused.items()]
    return [ran(row) for row in rows] + empty


def note(what: str, reason: str) -> str:
    """A line for under a table: ``what`` could not run."""
    return f"{what}: could not run: {' '.join(reason.split())}"


def refusal_notes(refused: Refusals) -> list[str]:
    """A line for each policy in ``refused``."""
    return [note(label, why) for label, why in refused.items()]
