"""Amounts of memory in options and messages: `moepolicy.amounts` with this package's error."""

from __future__ import annotations

from moepolicy import amounts
from moepolicy.amounts import counted, decimal_bytes, format_bytes, unit_hint

from moerun.errors import UsageError

__all__ = ["counted", "decimal_bytes", "format_bytes", "parse_bytes", "unit_hint"]


def parse_bytes(text: str) -> int:
    """Bytes of a text: 9GiB, 500 MB, 1.5GiB or plain bytes. UsageError for other texts."""
    try:
        return amounts.parse_bytes(text)
    except amounts.NoAmountError as error:
        raise UsageError(str(error)) from None
