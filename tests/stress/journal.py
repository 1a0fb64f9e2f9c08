"""The outcomes of a campaign on disk, a line of JSON each, from which it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Generic, TypeVar

Outcome = TypeVar("Outcome")


class Journaled(Generic[Outcome]):
    """A campaign's folder, and in ``outcomes`` what its journal holds; ``kind`` is their class."""

    def __init__(self, folder: Path, journal: str, kind: type[Outcome]) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.folder / journal
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        self.outcomes = [kind(**json.loads(line)) for line in lines]
