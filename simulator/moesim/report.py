"""Results as a table for people, or as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from moesim.files import written_whole
from moesim.limits import Gap, gap_of
from moesim.limits.bounds import BASELINE
from moesim.machine.unknown import size_notes
from moesim.simulate import Result

WIDTH = 100  # of a table that is not printed to a terminal


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class Compared(NamedTuple):
    """A result and, where limits were asked for, its share of the gap between LRU and them."""

    result: Result
    gap: Gap | None

    def row(self) -> dict[str, Any]:
        return self.result.row() | (self.gap or Gap(self.result.policy, None, None)).row()


def beside_baseline(results: Sequence[Result], baseline: Callable[[int], Result]) -> list[Compared]:
    """``results`` and the gaps they close; ``baseline`` runs LRU with so many slots, if need be."""
    bases = {result.slots: result for result in results if result.policy == BASELINE}
    for result in results:
        if result.slots not in bases:
            bases[result.slots] = baseline(result.slots)
    return [Compared(one, gap_of(bases[one.slots].row(), one.row())) for one in results]


def render(
    results: Sequence[Compared], format: Format, title: str, provenance: dict[str, Any]
) -> str:
    """The results in one format. JSON and CSV rows carry their provenance; a table its title."""
    if format is Format.table:
        return _table(results, title)
    rows = [one.row() | provenance for one in results]
    if format is Format.json:
        return json.dumps(rows, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def deliver(text: str, out: Path | None) -> None:
    """Print, or write ``out`` whole or not at all."""
    if out is None:
        sys.stdout.write(text)
        return
    with written_whole(out) as partial:
        partial.write_text(text, encoding="utf-8")


def _table(results: Sequence[Compared], title: str) -> str:
    """A group of rows for each number of slots, which ends with what no policy can beat."""
    limited = results[0].gap is not None
    names = ["slots", "hit %", "late %", "loads", "useless", "stall %", "tokens/s"]
    if limited:
        names.insert(names.index("loads") + 1, "x limit")
        names += ["limit %", "gap %"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("policy", overflow="fold")  # a long spec folds before a number is cut
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for _, each in groupby(results, key=lambda one: one.result.slots):
        group = list(each)
        for one in group:
            cells = _cells(one)
            table.add_row(cells["policy"], *(cells[name] for name in names))
        for cells in _limits([one.result for one in group]) if limited else ():
            table.add_row(cells["policy"], *(cells.get(name, "") for name in names), style="dim")
        table.add_section()
    console = Console(file=io.StringIO(), width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([title, *lines, *_notes(results, limited)]) + "\n"


def _cells(one: Compared) -> dict[str, str]:
    result = one.result
    cells = {
        "policy": result.policy + ("*" if result.lossy else ""),
        "slots": str(result.slots),
        "hit %": f"{100 * result.hit_ratio:.1f}",
        "late %": f"{100 * result.late / result.requests:.1f}",
        "loads": f"{result.loads:,}",
        "useless": f"{result.useless_prefetches:,}",
        "stall %": percent(_stall_share(result)),
        "tokens/s": per_second(result.tokens_per_s),
    }
    if one.gap is not None:
        cells["x limit"] = f"{result.loads / result.limit_loads:.2f}" if result.limit_loads else "-"
        cells["limit %"] = percent(result.share_of_limit)
        cells["gap %"] = percent(one.gap.time)
    return cells


def _stall_share(result: Result) -> float | None:
    if result.stall_s is None or not result.time_s:
        return None
    return result.stall_s / result.time_s


def per_second(tokens_per_s: float | None) -> str:
    """tokens/s for a table; None: there are no times."""
    return "-" if tokens_per_s is None else f"{tokens_per_s:.2f}"


def percent(share: float | None) -> str:
    """Far below 0 where there is next to no gap: decimals would say nothing there."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if abs(share) < 10 else f"{100 * share:.0f}"


def _limits(results: Sequence[Result]) -> list[dict[str, str]]:
    """A row for each limit there is: staging buffers may raise that of policies that have them."""
    found: dict[tuple[int, float | None], Result] = {}
    for result in sorted(results, key=lambda result: result.limit_buffers or 0):
        found.setdefault((result.slots, result.limit_tokens_per_s), result)
    return [
        {
            "policy": f"limit+{result.limit_buffers}" if result.limit_buffers else "limit",
            "slots": str(result.slots),
            "loads": f"{result.limit_loads:,}",
            "x limit": "1.00",
            "tokens/s": per_second(result.limit_tokens_per_s),
            "limit %": percent(result.limit_tokens_per_s and 1.0),
            "gap %": percent(result.limit_tokens_per_s and 1.0),
        }
        for result in found.values()
    ]


def _notes(compared: Sequence[Compared], limited: bool) -> list[str]:
    results = [one.result for one in compared]
    notes = []
    if limited:
        kept = {result.slots: result.limit_loads_kept for result in results}
        each = ", ".join(f"{loads:,} at {slots}" for slots, loads in sorted(kept.items()))
        notes = [
            "limit: the fewest loads and the least time that any policy could do with the slots,",
            f"  knowing the future; without prefetch and bypass the fewest loads are {each}",
            f"gap %: how much of the time a token takes longer under {BASELINE} than at the limit "
            "a policy saves",
        ]
        names = sorted({row["policy"] for row in _limits(results)} - {"limit"})
        if names:
            notes.insert(2, f"  ({', '.join(names)}: with so many staging buffers for prefetches)")
        if all(result.policy != BASELINE for result in results):
            notes.append(f"  ({BASELINE} is not among the policies; it was simulated for this)")
    if any(result.lossy for result in results):
        notes.append("* changes what the model computes" + ": no limit binds it" * limited)
        notes += [_change_note(result) for result in results if result.lossy]
    return notes + size_notes(result.row() for result in results)


def _change_note(result: Result) -> str:
    shares = {
        "left out": result.skipped_share,
        "computed by another expert": result.substituted_share,
        "computed at the lower precision": result.low_share,
    }
    changes = ", ".join(f"{100 * share:.1f} % {what}" for what, share in shares.items() if share)
    return f"  {result.policy}, {result.slots} slots: of the gates' weight {changes or 'nothing'}"
