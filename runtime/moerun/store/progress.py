"""Whom long work on a store tells how far it is, and what to know about it."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Told one sentence."""

RecordProgress = Callable[[int, int], None]
"""Told of records done and records in all."""


def silent(*_: object) -> None:
    """Ignore a report of progress."""
