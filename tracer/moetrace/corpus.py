"""The text a recording is made over: files, folders and JSON lines, cut into token windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moeroute.jsontext import parse_json
from moerun.errors import RunError

NO_TEXT = "the corpus is empty: it has no file with text in it"
_JSON_LINES = frozenset({".jsonl", ".ndjson"})


class Document(NamedTuple):
    """One text and where it is from, for messages."""

    where: str
    text: str


def check_corpus(paths: Sequence[Path], field: str | None = None) -> None:
    """RunError for a corpus that is not there, or for a field that it has no file for: what can be
    told before a model is loaded."""
    found = list(_files(paths))
    if field is not None and not any(map(is_json_lines, found)):
        raise RunError(f"--field {field}: the corpus has no .jsonl file to take it from")
    if not found:
        raise RunError(f"the corpus is empty: no files in {', '.join(map(str, paths))}")


def read_documents(paths: Sequence[Path], field: str | None = None) -> Iterator[Document]:
    """The texts of files and folders in order; of JSON lines, the string under `field` of each.

    A folder gives all files below it that hold UTF-8 text, sorted by path, hidden ones left out.
    Raises RunError for what is not there, is no text, or lacks the field.
    """
    check_corpus(paths, field)
    for given in paths:
        for path in _files([given]):
            if is_json_lines(path):
                yield from _json_documents(path, field)
            elif (text := _read_text(path)) is not None:
                yield Document(str(path), text)
            elif path == given:
                raise RunError(f"{path} is no text: it is not UTF-8")


def is_json_lines(path: Path) -> bool:
    """Whether a file is taken as one JSON object a line, by its name."""
    return path.suffix.lower() in _JSON_LINES


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for given in paths:
        if not given.exists():
            raise RunError(f"corpus {given}: there is no such file or folder")
        if not given.is_dir():
            yield given
            continue
        for path in sorted(given.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(given).parts)
            if path.is_file() and not hidden:
                yield path


def _read_text(path: Path) -> str | None:
    raw = path.read_bytes()
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _json_documents(path: Path, field: str | None) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            yield Document(where, _field_of(line, field, where))


def _field_of(line: bytes, field: str | None, where: str) -> str:
    try:
        record: Any = parse_json(line)
    except json.JSONDecodeError as error:
        raise RunError(f"{where}: is not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise RunError(f"{where}: is not a JSON object")
    texts = ", ".join(name for name, value in record.items() if isinstance(value, str)) or "none"
    if field is None:
        raise RunError(f"{where}: say with --field which field is the text; there are: {texts}")
    if not isinstance(record.get(field), str):
        raise RunError(f"{where}: has no text under {field!r}; fields with text are: {texts}")
    return str(record[field])


@dataclass(frozen=True)
class Windows:
    """What is fed to the model: one sequence of token ids each, in the order of the corpus."""

    sequences: list[list[int]]
    digest: str  # sha256 over the texts that the windows are from

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)


def cut_windows(
    documents: Iterable[Document], tokenizer: Any, length: int, max_tokens: int | None = None
) -> Windows:
    """Cut each document's tokens into sequences of `length`, the last of each shorter.

    Stops at `max_tokens` tokens in all. Raises RunError when there is nothing to feed.
    """
    sequences: list[list[int]] = []
    digest = hashlib.sha256()
    left = max_tokens if max_tokens is not None else -1
    empty: list[str] = []
    for document in documents:
        if left == 0:
            break
        raw = document.text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        if left > 0:
            ids = ids[:left]
            left -= len(ids)
        empty += [] if ids else [document.where]
        sequences += [ids[start : start + length] for start in range(0, len(ids), length)]
    if not sequences:
        more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        raise RunError(f"the corpus is empty: no text in {empty[0]}{more}" if empty else NO_TEXT)
    return Windows(sequences, digest.hexdigest())
