"""JSON and TOML that nobody wrote in good faith."""

from __future__ import annotations

import json
import tomllib

import pytest
from moeroute.jsontext import journal_entries, parse_json, parse_toml


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, b"[" * 100_000, '{"a":' * 100_000, "", "{", "nul"),
        *(b'"\xff"', b"\0\0\0\0", b"\xfe\xff\xd8", "9" * 5000),
    ],
)
def test_every_failure_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)


def test_a_value_is_what_it_says() -> None:
    assert parse_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    "text",
    [
        b"a = " + b"[" * 5000 + b"]" * 5000,
        b"a = " + b"{a = " * 5000 + b"1" + b"}" * 5000,
        b"a = " + b"9" * 5000,
        b'a = "\xff"',
        b"a = ",
        b"a = 1979-13-27",
    ],
)
def test_every_failure_of_a_table_is_one_kind_of_error(text: bytes) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        parse_toml(text)


def test_a_table_is_what_it_says() -> None:
    assert parse_toml("a = ['ü', 2.5]\n[b]\nc = true\n".encode()) == {
        "a": ["ü", 2.5],
        "b": {"c": True},
    }


def test_a_journal_has_what_its_whole_lines_hold() -> None:
    lines = [b'["a", 1]\n', b"3\n", b'{"a": 1}\n', b'["b"]\n', b"\0\0\n", b'["b", 2]\n', b'["c", 3']
    ends = [len(lines[0]), sum(map(len, lines[:6]))]
    assert list(journal_entries(lines, 2)) == [(ends[0], ["a", 1]), (ends[1], ["b", 2])]
