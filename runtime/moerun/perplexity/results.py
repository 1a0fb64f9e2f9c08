"""The results of a grid: cells in a file that is always whole, windows in a journal.

`RESULTS.jsonl` holds what was measured (first line) and a line for each finished cell, and is
replaced as a whole; `RESULTS.jsonl.windows` holds the windows of cells that are not finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

from moepolicy.outputs import naming

from moerun.errors import RunError

KIND = "moerun perplexity"
Key = tuple[str, str, str]
"""Precision of attention, precision of experts, policy."""


class Scored(NamedTuple):
    """One window: its negative log-likelihood, and of the gates' weights the sum, what was left
    out, computed by another expert, and computed at the lower precision."""

    nats: float
    gate_mass: float = 0.0
    skipped_mass: float = 0.0
    substituted_mass: float = 0.0
    low_mass: float = 0.0


@dataclass(frozen=True, slots=True)
class Published:
    """What the base paper's Table 1 has for this cell; GiB of the whole model."""

    size_gib: float
    wikitext2: float
    c4: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One store on one text under one policy. Bytes are of files; bits_per_byte is of the text's.

    The shares are of the gates' weights, as in a run's report; low_expert_bytes are those of the
    second store that the policy loads from. The data bytes are what is left of experts' and of
    attention's without what rounds each record up to whole pages; 0: not noted.
    """

    attention: str
    experts: str
    policy: str
    lossy: bool
    perplexity: float
    bits_per_byte: float
    scored_tokens: int
    nats: float
    store_bytes: int
    expert_bytes: int
    attention_bytes: int
    low_expert_bytes: int
    bits_per_weight: float
    skipped_share: float
    substituted_share: float
    low_share: float
    published: Published | None
    expert_data_bytes: int = 0
    attention_data_bytes: int = 0

    @property
    def key(self) -> Key:
        """What the cell is filed under: precision of attention, precision of experts, policy."""
        return self.attention, self.experts, self.policy

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> Cell:
        """Raises TypeError when the description is not one of a cell."""
        row = described.pop("published")
        return cls(**described, published=Published(**row) if row else None)


class Results:
    """The two files, held by one process at a time. A context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Takes up what is there. Raises RunError when it is of another measurement."""
        self.path = path
        self._identity = {"kind": KIND, **identity}
        self._windows: dict[Key, dict[int, Scored]] = {}
        self.cells: dict[Key, Cell] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = self._locked(path.with_name(f"{path.name}.windows"))
        try:
            self._read_cells()
            self._read_windows()
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def windows(self, key: Key) -> dict[int, Scored]:
        """The windows of a cell that are measured, by number."""
        return dict(self._windows.get(key, {}))

    def add_window(self, key: Key, number: int, scored: Scored) -> None:
        """Append a measured window of the cell ``key`` to the journal."""
        with naming(Path(self._journal.name)):
            self._journal.write(json.dumps([*key, number, *scored]) + "\n")
            self._journal.flush()

    def add_cell(self, cell: Cell) -> None:
        """Add a measured cell, and write the file of cells anew."""
        self.cells[cell.key] = cell
        self._write_cells()

    def finish(self) -> None:
        """Delete the journal, unless the journal has windows of another grid."""
        if self._windows.keys() <= self.cells.keys():
            Path(self._journal.name).unlink()

    def _locked(self, path: Path) -> TextIO:
        journal = path.open("a+")
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            journal.close()
            raise RunError(
                f"another process is measuring into {self.path}: wait for it to end, or give "
                "another --out"
            ) from error
        return journal

    def _refuse(self, why: str) -> RunError:
        return RunError(f"{self.path} {why}: give another --out, or remove the file")

    def _read_cells(self) -> None:
        if not self.path.exists():
            self._journal.truncate(0)  # nothing says what a journal left alone is of
            self._write_cells()
            return
        try:
            header, *rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            cells = [Cell.from_json(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._refuse("holds no results of 'moerun perplexity'") from error
        for name, value in self._identity.items():
            if header.get(name) != value:
                raise self._refuse(
                    f"holds results of another measurement ({name} is {header.get(name)!r}, "
                    f"not {value!r})"
                )
        self.cells = {cell.key: cell for cell in cells}

    def _read_windows(self) -> None:
        self._journal.seek(0)
        whole = 0
        for line in self._journal.read().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the last line of a killed run
            attention, experts, policy, number, *scored = json.loads(line)
            self._windows.setdefault((attention, experts, policy), {})[number] = Scored(*scored)
            whole += len(line)
        self._journal.truncate(whole)

    def _write_cells(self) -> None:
        lines = [self._identity, *(asdict(cell) for cell in self.cells.values())]
        partial = self.path.with_name(f"{self.path.name}.new")
        with naming(self.path, partial):
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
