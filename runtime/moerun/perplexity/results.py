"""The results of a grid: cells in a file that is always whole, windows in a journal.

`RESULTS.jsonl` holds what was measured (first line) and a line for each finished cell, and is
replaced as a whole; `RESULTS.jsonl.windows` holds the windows of cells that are not finished.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

from moepolicy.lossy import CHANGES
from moepolicy.outputs import naming, written_whole
from moeroute.jsontext import parse_json

from moerun.errors import RunError

KIND = "moerun perplexity"
Key = tuple[str, str, str]
"""Precision of attention, precision of experts, policy."""


class Scored(NamedTuple):
    """One window: its negative log-likelihood, and of the gates' weights the sum, what was left
    out, computed by another expert, computed at the lower precision, and routed elsewhere."""

    nats: float
    gate_mass: float = 0.0
    skipped_mass: float = 0.0
    substituted_mass: float = 0.0
    low_mass: float = 0.0
    rerouted_mass: float = 0.0


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
    rerouted_share: float = 0.0

    @property
    def key(self) -> Key:
        """What the cell is filed under: precision of attention, precision of experts, policy."""
        return self.attention, self.experts, self.policy

    @property
    def shares(self) -> dict[str, float]:
        """What the policy changed, by the names of the columns."""
        return {name: getattr(self, name) for name in CHANGES}

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> Cell:
        """Raises TypeError, ValueError or OverflowError when the description is not of a cell."""
        for one in fields(cls):
            if one.type == "str" and not isinstance(described[one.name], str):
                raise TypeError(f"{one.name} is {described[one.name]!r}, not a name")
            if one.type in ("int", "float") and one.name in described:
                _check_number(one.name, described[one.name])
        row = described.pop("published")
        return cls(**described, published=Published(**row) if row else None)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} is {value!r}, not a number")


class Results:
    """The two files, held by one process at a time. A context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Takes up what is there. Raises RunError when it is of another measurement."""
        self.path = path
        self._identity = {"kind": KIND, **identity}
        self._windows: dict[Key, dict[int, Scored]] = {}
        self.cells: dict[Key, Cell] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = self._locked(path.with_name(f"{path.name}.windows"))
        except OSError as error:
            raise RunError(
                f"{error.filename or path} cannot be written ({error.strerror}): name another file "
                "for the results with --out"
            ) from error
        try:
            self._read_cells()
            self._read_windows()
        except BaseException:
            self._drop_journal()
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
            os.fsync(self._journal.fileno())

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

    def _drop_journal(self) -> None:
        """Close the journal, and remove it where it holds nothing."""
        name = Path(self._journal.name)
        if not name.stat().st_size:
            name.unlink()
        self._journal.close()

    def _refuse(self, why: str) -> RunError:
        return RunError(f"{self.path} {why}: give another --out, or remove the file")

    def _read_cells(self) -> None:
        if not self.path.exists():
            self._journal.truncate(0)  # nothing says what a journal left alone is of
            self._write_cells()
            return
        try:
            header, *rows = map(parse_json, self.path.read_text(encoding="utf-8").splitlines())
            header = dict(header)
            cells = [Cell.from_json(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
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
            if not line.endswith("\n") or "\0" in line:
                break  # the last line of a killed run, or zeros after a power cut
            try:
                attention, experts, policy, number, *scored = parse_json(line)
                for value in (number, *scored):
                    _check_number("a window's value", value)
                window = Scored(*scored)
                self._windows.setdefault((attention, experts, policy), {})[number] = window
            except (ValueError, TypeError, OverflowError) as error:
                raise RunError(
                    f"{self._journal.name} holds no windows of 'moerun perplexity': remove the file"
                ) from error
            whole += len(line)
        self._journal.truncate(whole)

    def _write_cells(self) -> None:
        lines = [self._identity, *(asdict(cell) for cell in self.cells.values())]
        with written_whole(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
