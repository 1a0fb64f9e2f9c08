"""What the bundled model is trained on and scored against: books given by name, and this Python.

The books are public domain: Project Gutenberg 1342 (Pride and Prejudice) and 2600 (War and Peace),
from https://www.gutenberg.org/ebooks/NUMBER "Plain Text UTF-8", and "tinyshakespeare"
(https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt). The rest lies on every
machine with a Python: the standard library's sources with their docstrings, and pydoc's topics.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.05
# Tests and character tables would outweigh the library; pydoc's topics are a source of their own.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "turtledemo"),
    *("site-packages", "lib2to3", "encodings", "pydoc_data", "__pycache__"),
}


@dataclass(frozen=True)
class Source:
    """One named text: its documents in order, the last HELD_OUT_SHARE of its bytes held out."""

    name: str
    kind: str  # "prose" or "code"
    documents: tuple[str, ...]

    @property
    def held_out_from(self) -> int:
        """The byte of the joined documents at which the held-out tail starts: a line's first."""
        text = "".join(self.documents).encode()
        return text.index(b"\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1

    @property
    def n_bytes(self) -> int:
        """Bytes of all documents, as UTF-8."""
        return sum(len(document.encode()) for document in self.documents)

    def split(self) -> tuple[list[str], str]:
        """The documents to train on (the last one cut short) and the held-out text."""
        left = self.held_out_from
        training: list[str] = []
        for document in self.documents:
            raw = document.encode()
            if left > 0:
                training.append(raw[:left].decode())
            left -= len(raw)
        return training, "".join(self.documents).encode()[self.held_out_from :].decode()


def read_sources(paths: Iterable[Path], *, python: bool) -> list[Source]:
    """A source for each text file or folder of them, and with `python` the two of this Python.

    A folder's `.py` files make it code. Raises OSError for a path that cannot be read.
    """
    sources = [_from_path(path) for path in paths]
    if python:
        topics = importlib.import_module("pydoc_data.topics").topics
        sources.append(Source("pydoc", "prose", tuple(topics[name] for name in sorted(topics))))
        library = Path(sysconfig.get_paths()["stdlib"])
        sources.append(Source("stdlib", "code", tuple(_texts(library, ".py"))))
    return sources


def _from_path(path: Path) -> Source:
    if path.is_dir():
        suffix = ".py" if any(path.rglob("*.py")) else ".txt"
        kind = "code" if suffix == ".py" else "prose"
        return Source(path.name, kind, tuple(_texts(path, suffix)))
    kind = "code" if path.suffix == ".py" else "prose"
    return Source(path.stem, kind, (path.read_text(encoding="utf-8"),))


def _texts(folder: Path, suffix: str) -> list[str]:
    texts = []
    for path in sorted(folder.rglob(f"*{suffix}")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            if text.strip():
                texts.append(text)
    return texts
