"""Tables at any width: no name, number or column is lost."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence

import pytest
from moepolicy.tables import Table, described, table_width, to_csv, to_json, wrapped

ROWS = [("lru", "4", "46,427", "156.97"), ("a-long-policy:n=1", "4", "1,234,567", "8.50")]


def make(rows: Sequence[tuple[str, ...]] = ROWS) -> Table:
    table = Table(["policy", "slots"], ["loads", "tokens/s"], right=["slots"])
    for row in rows:
        table.add_row(*row)
    return table


def test_one_block_where_it_fits() -> None:
    assert make().render(80) == (
        "policy             slots      loads  tokens/s\n"
        "---------------------------------------------\n"
        "lru                    4     46,427    156.97\n"
        "a-long-policy:n=1      4  1,234,567      8.50\n"
    )


def test_columns_move_closer_before_they_are_split() -> None:
    assert make().render(44).splitlines()[0] == "policy            slots     loads tokens/s"


def test_what_does_not_fit_stands_in_a_second_block_under_the_names() -> None:
    assert make().render(40) == (
        "policy             slots      loads\n"
        "-----------------------------------\n"
        "lru                    4     46,427\n"
        "a-long-policy:n=1      4  1,234,567\n"
        "\n"
        "policy             slots  tokens/s\n"
        "----------------------------------\n"
        "lru                    4    156.97\n"
        "a-long-policy:n=1      4      8.50\n"
    )


def test_beside_names_too_long_for_the_width_each_row_is_a_paragraph() -> None:
    assert make().render(24) == (
        "policy  slots\n"
        "-------------\n"
        "lru  4\n"
        "  loads 46,427\n"
        "  tokens/s 156.97\n"
        "a-long-policy:n=1  4\n"
        "  loads 1,234,567\n"
        "  tokens/s 8.50\n"
    )


@pytest.mark.parametrize("width", [1, 10, 20, 30, 40, 60, 80, 200])
def test_every_cell_is_whole_at_every_width(width: int) -> None:
    shown = make().render(width).split()
    for row in ROWS:
        assert set(row) <= set(shown)


def test_sections_are_apart_and_headings_stand_over_their_columns() -> None:
    table = Table(["GPU"], ["link", "GB/s\nfitted"], left=["link"])
    table.add_row("T4", "PCIe 3.0", "9.9")
    table.end_section()
    table.add_row("A100", "PCIe 4.0", "19.9")
    table.end_section()
    assert table.render(80) == (
        "                  GB/s\n"
        "GPU   link      fitted\n"
        "----------------------\n"
        "T4    PCIe 3.0     9.9\n"
        "\n"
        "A100  PCIe 4.0    19.9\n"
    )


def test_wide_letters_markup_and_line_breaks_do_not_shift_a_row() -> None:
    table = Table(["policy"], ["n"])
    table.add_row("策略", "1")
    table.add_row("[bold]\nx", "22")
    assert table.render(80) == "policy     n\n------------\n策略       1\n[bold] x  22\n"


def test_a_row_has_a_cell_for_each_heading() -> None:
    with pytest.raises(ValueError, match="1 cells under 4 headings"):
        make([("lru",)])


def test_the_width_is_that_of_columns_or_100_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "57")
    assert table_width() == 57
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", io.StringIO())
    assert table_width() == 100


def test_notes_are_wrapped_at_blanks() -> None:
    assert wrapped(["limit: the fewest loads", "  of all", ""], 14) == (
        "limit: the\n  fewest loads\n  of all\n\n"
    )
    assert wrapped(["/a/path/longer/than/the/width is whole"], 10) == (
        "/a/path/longer/than/the/width\n  is whole\n"
    )


def test_descriptions_stand_beside_names_or_under_them() -> None:
    items = {"lru": "least recently used", "static": "counted"}
    assert described(items, 24) == "lru     least recently\n        used\nstatic  counted\n"
    assert described(items, 15) == ("lru\n  least\n    recently\n    used\nstatic\n  counted\n")


def test_json_has_no_word_for_what_is_no_number() -> None:
    document = {"a": math.inf, "b": [math.nan, 1.5], "c": {"d": -math.inf}}
    assert json.loads(to_json(document)) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_csv_keeps_the_items_of_a_list() -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv([{"policy": "a,b", "rounds": (1.5, 2.0)}])))
    assert row == {"policy": "a,b", "rounds": "1.5 2.0"}
