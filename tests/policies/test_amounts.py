"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest
from moepolicy.amounts import (
    NoAmountError,
    counted,
    decimal_bytes,
    format_bytes,
    parse_bytes,
    unit_hint,
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4096", 4096),
        ("9GiB", 9 << 30),
        (" 1.5 gib ", 3 << 29),
        ("66.7MB", 66_700_000),
        ("1.005MB", 1_005_000),  # 1004999 by floats
        ("9007199254740993", 2**53 + 1),
        ("0.3KiB", 307),
    ],
)
def test_a_text_is_read_to_the_byte(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1", "1.5", "2.5B", "4 gibs", "1e9", "9,5GiB"])
def test_what_is_no_amount_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(NoAmountError, match="is no amount of memory: write it as 9GiB, 500MB"):
        parse_bytes(text)


def test_a_small_amount_may_lack_its_unit() -> None:
    assert "a number without a unit is bytes" in unit_hint(24_000)
    assert unit_hint(100 << 10) == ""


def test_one_of_something_is_no_plural() -> None:
    assert [counted(n, "slot") for n in (0, 1, 2, 1000)] == [
        *("0 slots", "1 slot", "2 slots", "1,000 slots")
    ]


def test_amounts_are_printed_with_their_unit() -> None:
    assert [format_bytes(n) for n in (512, 1536, 3 << 29)] == ["512 bytes", "1.50 KiB", "1.50 GiB"]
    assert [decimal_bytes(n) for n in (15_500_000, 9 << 30)] == ["15.500 MB", "9.664 GB"]
