"""Results as a table for people, or as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesim.files import written_whole
from moesim.simulate import Result


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


def render(
    results: Sequence[Result], format: Format, title: str, provenance: dict[str, Any]
) -> str:
    """The results in one format. JSON and CSV rows carry their provenance; a table its title."""
    if format is Format.table:
        return _table(results, title)
    rows = [result.row() | provenance for result in results]
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


def _table(results: Sequence[Result], title: str) -> str:
    table = Table(header_style="bold")
    table.add_column("policy", overflow="fold")  # a long spec folds before a number is cut
    for name in ("slots", "hit %", "late %", "loads", "x limit", "useless", "stall %", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for i, result in enumerate(results):
        last_of_group = i + 1 < len(results) and results[i + 1].slots != result.slots
        table.add_row(*_cells(result), end_section=last_of_group)
    width = None if sys.stdout.isatty() else 120
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    text = stream.getvalue()
    notes = [_limit_note(results)]
    if any(result.lossy for result in results):
        notes.append("* changes what the model computes")
        notes += [_change_note(result) for result in results if result.lossy]
    return f"{title}\n{text}" + "\n".join(notes) + "\n"


def _cells(result: Result) -> list[str]:
    over = result.loads / result.limit_loads if result.limit_loads else float("nan")
    return [
        result.policy + ("*" if result.lossy else ""),
        str(result.slots),
        f"{100 * result.hit_ratio:.1f}",
        f"{100 * result.late / result.requests:.1f}",
        f"{result.loads:,}",
        f"{over:.2f}",
        f"{result.useless_prefetches:,}",
        f"{100 * result.stall_s / result.time_s:.1f}",
        f"{result.tokens_per_s:.2f}",
    ]


def _limit_note(results: Sequence[Result]) -> str:
    limits = {(r.slots, r.limit_loads) for r in results}
    each = ", ".join(f"{loads:,} at {slots}" for slots, loads in sorted(limits))
    return f"limit (fewest loads any policy could do with the slots, knowing the future): {each}"


def _change_note(result: Result) -> str:
    shares = {
        "left out": result.skipped_share,
        "computed by another expert": result.substituted_share,
        "computed at the lower precision": result.low_share,
    }
    changes = ", ".join(f"{100 * share:.1f} % {what}" for what, share in shares.items() if share)
    return f"  {result.policy}, {result.slots} slots: of the gates' weight {changes or 'nothing'}"
