"""Amounts as people write and read them: memory as 9GiB, 4 MB or 1,048,576 bytes, and 1 expert.

GB is 10^9 bytes and GiB 2^30.
"""

from __future__ import annotations

import re
from decimal import Decimal

from moepolicy.console import WrongUsage

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}
"""Bytes of each unit. A unit is read in upper or lower case."""
UNITLESS_BYTES = 100_000  # below, a number may well be of GB or MB


class NoAmountError(ValueError, WrongUsage):
    """A text that says no amount of memory."""


def parse_bytes(text: str) -> int:
    """Bytes of a text: 9GiB, 500 MB, 1.5GiB or plain bytes, rounded down to whole bytes.

    NoAmountError for other texts, and for a fraction of bytes, which lacks its unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    unit = found[2].lower() if found else ""
    if not found or unit not in units or ("." in found[1] and units[unit] == 1):
        raise NoAmountError(
            f"'{text.strip()}' is no amount of memory: write it as 9GiB, 500MB or bytes"
        )
    return int(Decimal(found[1]) * units[unit])


def unit_hint(n_bytes: int) -> str:
    """What ends an error about too little memory where its amount looks as if it lacked its unit:
    12 for 12 GiB, or 24000 for so many MB. "" for larger amounts."""
    if n_bytes >= UNITLESS_BYTES:
        return ""
    return "; a number without a unit is bytes: write it as 9GiB or 500MB"


def format_bytes(n_bytes: int) -> str:
    """A number of bytes in the largest binary unit up to GiB that it fills, or in bytes."""
    for unit in ("GiB", "MiB", "KiB"):
        if n_bytes >= UNITS[unit]:
            return f"{n_bytes / UNITS[unit]:.2f} {unit}"
    return f"{n_bytes} bytes"


def counted(n: int, what: str) -> str:
    """So many of something whose plural ends in s: 1 expert, 2 experts, 1,000 experts."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def cache_of(scope: str) -> str:
    """A scope in words: whether each layer has a cache of its own."""
    return "one cache for all layers" if scope == "global" else f"cache per {scope}"


def decimal_bytes(n_bytes: int) -> str:
    """A number of bytes in GB (10^9), or in MB below 1 GB."""
    return f"{n_bytes / 1e9:.3f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3f} MB"
