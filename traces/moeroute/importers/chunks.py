"""Chunks of rows put together: an importer may make them as small as its file's records are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from moeroute.importers.fields import LISTS, padded
from moeroute.importers.recording import CHUNK_ROWS, Columns


def gathered(chunks: Iterable[Columns]) -> Iterator[Columns]:
    """The same rows, many at a time."""
    held: list[Columns] = []
    n = 0
    for chunk in chunks:
        if held and chunk.keys() != held[0].keys():
            yield joined(held)
            held, n = [], 0
        held.append(chunk)
        n += len(chunk["layer"])
        if n >= CHUNK_ROWS:
            yield joined(held)
            held, n = [], 0
    if held:
        yield joined(held)


def joined(parts: list[Columns]) -> Columns:
    """Chunks with the same columns as one; rows with fewer experts than others are filled up."""
    if not parts:
        return {"layer": np.empty(0, np.int64), "experts": np.empty((0, 1), np.int64)}
    found = {}
    for name in set.intersection(*(set(part) for part in parts)):
        columns = [part[name] for part in parts]
        if name in LISTS and len({column.shape[1] for column in columns}) > 1:
            lengths = np.repeat([c.shape[1] for c in columns], [len(c) for c in columns])
            flat = np.concatenate([np.ascontiguousarray(c).ravel() for c in columns])
            found[name] = padded(flat, lengths, -1 if name == "experts" else 0)
        else:
            found[name] = np.concatenate(columns)
    return found
