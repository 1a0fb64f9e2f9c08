"""What an import changed, dropped, reordered or could not know: one line each, with counts."""

from __future__ import annotations

import json


class Findings:
    """Collects an import's notes by name, in order; they become the trace's notes.

    An importer, and the steps that all importers share, `note` what a person must be told, and
    `keep` facts that programs look up.
    """

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._facts: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._notes

    def note(self, name: str, text: str) -> None:
        """Say `text` under `name`; what stood there under `name` is added to, not replaced."""
        said = self._notes.get(name)
        self._notes[name] = text if said is None else f"{said}; {text}"

    def count(self, name: str, n: int, text: str, *, of: int | None = None) -> None:
        """Say "`n` of `of` `text`" under `name`, or nothing if there are none."""
        if n:
            self.note(name, f"{n}{'' if of is None else f' of {of}'} {text}")

    def keep(self, name: str, fact: object) -> None:
        """Keep a fact in the trace's notes: text as it is, the rest as JSON."""
        self._facts[name] = fact if isinstance(fact, str) else json.dumps(fact)

    def lines(self) -> list[str]:
        """One line a note, for people."""
        return [f"{name}: {text}" for name, text in self._notes.items()]

    def as_notes(self) -> dict[str, str]:
        """Facts and notes, for the trace's metadata."""
        return self._facts | self._notes
