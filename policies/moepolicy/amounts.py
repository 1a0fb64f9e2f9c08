"""Amounts of memory as people write and read them: 9GiB, 4 MB, 1,048,576 bytes.

GB is 10^9 bytes and GiB 2^30.
"""

from __future__ import annotations

import re

from moepolicy.console import WrongUsage

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}
"""Bytes of each unit. A unit is read in upper or lower case."""


class NoAmountError(ValueError, WrongUsage):
    """A text that says no amount of memory."""


def parse_bytes(text: str) -> int:
    """Bytes of a text: 9GiB, 500 MB, 1.5GiB or plain bytes. NoAmountError for other texts."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise NoAmountError(
            f"'{text.strip()}' is no amount of memory: write it as 9GiB, 500MB or bytes"
        )
    return int(float(found[1]) * units[found[2].lower()])


def format_bytes(n_bytes: int) -> str:
    """A number of bytes in the largest binary unit up to GiB that it fills, or in bytes."""
    for unit in ("GiB", "MiB", "KiB"):
        if n_bytes >= UNITS[unit]:
            return f"{n_bytes / UNITS[unit]:.2f} {unit}"
    return f"{n_bytes} bytes"


def decimal_bytes(n_bytes: int) -> str:
    """A number of bytes in GB (10^9), or in MB below 1 GB."""
    return f"{n_bytes / 1e9:.3f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3f} MB"
