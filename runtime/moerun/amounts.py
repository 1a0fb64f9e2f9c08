"""Amounts of memory as people write them: 9GiB, 4 MB, 1,048,576 bytes."""

from __future__ import annotations

import re

from moerun.errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}


def parse_bytes(text: str) -> int:
    """9GiB, 500 MB, 1.5GiB or plain bytes. Raises RunError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise UsageError(
            f"'{text.strip()}' is no amount of memory: write it as 9GiB, 500MB or bytes"
        )
    return int(float(found[1]) * units[found[2].lower()])


def format_bytes(n_bytes: int) -> str:
    """In the largest of GiB, MiB (2^20) and KiB that fits, or in bytes below one."""
    for unit in ("GiB", "MiB", "KiB"):
        if n_bytes >= UNITS[unit]:
            return f"{n_bytes / UNITS[unit]:.2f} {unit}"
    return f"{n_bytes} bytes"


def decimal_bytes(n_bytes: int) -> str:
    """In GB (10^9), or in MB below one."""
    return f"{n_bytes / 1e9:.3f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3f} MB"
