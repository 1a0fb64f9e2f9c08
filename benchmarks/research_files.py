"""Tables of research.py as files: written, and those of an earlier run read again."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def speeds_in(table: Path, name: str, slots: int, machine: str) -> dict[str, float]:
    """Tokens/s of the policies that are not ours, by a table of times."""
    row = row_of(table, name, slots, machine=machine)
    others = {"lru": row["lru"], row["which"]: row["best published"]}
    others |= {"clairvoyant": row["clairvoyant"]} if row["clairvoyant"] else {}
    return {policy: float(value) for policy, value in others.items()}


def row_of(table: Path, name: str, slots: int, **of: str) -> dict[str, str]:
    """The row of a table of an earlier run."""
    wanted = {"trace": name, "slots": str(slots)} | of
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if wanted.items() <= row.items():
                return row
    raise SystemExit(f"{table} has no row of {wanted}")


def agrees(earlier: float, now: float, table: Path) -> None:
    """SystemExit where a policy that has not changed no longer gives what it gave."""
    if abs(earlier - now) > 1e-9 * abs(now):
        raise SystemExit(f"{table} is of another trace: under lru {earlier}, now {now}")


def write(path: Path, rows: list[Row], digits: int) -> None:
    """``path`` with .csv, and with .md at so many digits."""
    if not rows:
        return
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(shown(value, digits) for value in row.values()) for row in rows]
    text = "".join(f"| {line} |\n" for line in lines)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def shown(value: Any, digits: int) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.{digits}f}" if np.isfinite(value) else "-"
    return "-" if value is None else str(value)
