"""Tables of research.py as files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


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
