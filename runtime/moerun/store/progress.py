"""Callbacks that are told of the progress of long work on a store."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Told one sentence."""

RecordProgress = Callable[[int, int], None]
"""Told of records done and records in all."""


def silent(*_: object) -> None:
    """Ignore a report of progress."""
