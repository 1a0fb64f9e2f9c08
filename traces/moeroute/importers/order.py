"""The order of a recording's rows: a trace's, and the file's own order of time where it has one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.findings import Findings
from moeroute.importers.recording import Columns
from moeroute.schema import DECODE

Index = NDArray[np.intp]
Flags = NDArray[np.bool_]


@dataclass
class Ordered:
    """The keys of rows in a trace's order, and which row of the file each is."""

    keys: Columns
    order: Index

    def without(self, dropped: Flags) -> Ordered:
        """The same without some rows."""
        kept = {name: column[~dropped] for name, column in self.keys.items()}
        return Ordered(kept, self.order[~dropped])


def sort(keys: Columns) -> Ordered:
    """Sort by sequence, position, layer; rows that are there twice stay in the file's order."""
    token = token_of(keys)
    layer = keys["layer"]
    ascending = (token[1:] > token[:-1]) | ((token[1:] == token[:-1]) & (layer[1:] > layer[:-1]))
    if ascending.all():
        return Ordered(dict(keys), np.arange(len(token)))
    order = np.lexsort((layer, token))
    return Ordered({name: column[order] for name, column in keys.items()}, order)


def token_of(keys: Columns) -> NDArray[np.uint64]:
    """One number for each (sequence, position), in their order."""
    return keys["sequence"].astype(np.uint64) << np.uint64(32) | keys["position"]


def repeated(rows: Ordered) -> Flags:
    """Which rows have the (sequence, position, layer) of the row before."""
    token, layer = token_of(rows.keys), rows.keys["layer"]
    return np.append(False, (token[1:] == token[:-1]) & (layer[1:] == layer[:-1]))


def begins(column: NDArray[np.generic]) -> Index:
    """The first row of each run of one value."""
    return np.flatnonzero(np.append(True, column[1:] != column[:-1]))


def by_rule(keys: Columns) -> Index:
    """The first row of each forward pass by a trace's rule for rows without passes: a prompt is one
    pass, and so is each decoded token."""
    sequence, phase = keys["sequence"], keys["phase"]
    token = token_of(keys)
    new = (phase[1:] != phase[:-1]) | (sequence[1:] != sequence[:-1])
    new |= (token[1:] != token[:-1]) & (phase[1:] == DECODE)
    return np.flatnonzero(np.append(True, new))


def keep_time(rows: Ordered, findings: Findings) -> Ordered:
    """Bring sequences into the file's order, and note which tokens came between others'.

    A file has an order of time where each sequence's tokens come by position. Then its sequences
    are numbered in their order, and, where tokens of several alternate, `pass_id` keeps it.
    """
    keys = rows.keys
    if "pass_id" in keys:
        return _with_passes(rows, findings)
    heads = begins(token_of(keys))
    first = np.minimum.reduceat(rows.order, heads)  # of each token, in the file
    sequence = keys["sequence"][heads]
    same = sequence[1:] == sequence[:-1]
    if (same & (first[1:] < first[:-1])).any():
        _tell_unordered(rows, sequence, first, findings)
        return rows
    starts = begins(sequence)
    began = first[starts]
    ended = np.maximum.reduceat(first, starts)
    numbers = sequence[starts]
    by_time = np.argsort(began, kind="stable")
    if (began[by_time[1:]] < ended[by_time[:-1]]).any():
        units = by_rule(keys)
        unit_first = np.minimum.reduceat(rows.order, units)
        rank = np.empty(len(units), np.uint32)
        rank[np.argsort(unit_first, kind="stable")] = np.arange(len(units), dtype=np.uint32)
        lengths = np.diff(np.append(units, len(rows.order)))
        keys = keys | {"pass_id": np.repeat(rank, lengths)}
        findings.note(
            "passes",
            "tokens of several sequences alternate in the file: pass_id keeps that order",
        )
    rows = Ordered(keys, rows.order)
    if (np.diff(by_time) < 0).any():
        return _renumbered(rows, numbers, by_time, findings)
    return rows


def _renumbered(
    rows: Ordered, numbers: NDArray[np.generic], by_time: Index, findings: Findings
) -> Ordered:
    rank = np.empty(len(numbers), np.uint32)
    rank[by_time] = np.arange(len(numbers), dtype=np.uint32)
    of = np.searchsorted(numbers, rows.keys["sequence"])
    named = ", ".join(str(n) for n in numbers[by_time][:3]) + (", ..." if len(numbers) > 3 else "")
    findings.note(
        "sequences", f"{named} of the file, in its order, are 0 to {len(numbers) - 1} now"
    )
    again = sort(rows.keys | {"sequence": rank[of]})
    return Ordered(again.keys, rows.order[again.order])


def _tell_unordered(
    rows: Ordered, sequence: NDArray[np.generic], first: Index, findings: Findings
) -> None:
    moved = int((rows.order != np.arange(len(rows.order))).sum())
    findings.count(
        "order",
        moved,
        "rows stood elsewhere: sorted by sequence, position, layer",
        of=len(rows.order),
    )
    starts = begins(sequence)
    began = np.minimum.reduceat(first, starts)
    if (np.diff(began) < 0).any():
        named = ", ".join(str(n) for n in sequence[starts][np.argsort(began)][:3])
        findings.note(
            "sequences", f"order changed: by number now, in the file {named}, ... come first"
        )


def _with_passes(rows: Ordered, findings: Findings) -> Ordered:
    """Number recorded passes from 0; leave them out where a trace's rule says the same."""
    found = rows.keys["pass_id"]
    values, dense = np.unique(found, return_inverse=True)
    units = by_rule(rows.keys)
    rule = np.zeros(len(found), np.int64)
    rule[units[1:]] = 1
    if (np.cumsum(rule) == dense).all():
        keys = {name: column for name, column in rows.keys.items() if name != "pass_id"}
        return Ordered(keys, rows.order)
    findings.keep("passes", f"{len(values)} forward passes, as recorded")
    return Ordered(rows.keys | {"pass_id": dense.astype(np.uint32)}, rows.order)
