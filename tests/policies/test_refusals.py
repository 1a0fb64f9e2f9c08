"""Rows of policies that could not run stand among the others, with the same columns."""

from __future__ import annotations

from moepolicy.refusals import empty_row, refusal_notes, refused_row, with_refused


def test_refused_policies_have_rows_with_every_column_in_order() -> None:
    rows = with_refused([{"policy": "lru", "hits": 3}], {"belady": "needs\nthe future"})
    assert rows == [
        {"policy": "lru", "hits": 3, "refused": None},
        {"policy": "belady", "hits": None, "refused": "needs\nthe future"},
    ]
    assert [list(row) for row in rows] == [["policy", "hits", "refused"]] * 2
    assert with_refused([], {"belady": "why"}) == [{"policy": "belady", "refused": "why"}]
    assert list(empty_row(("a", "b"), {"c": 1, "a": 2})) == ["a", "b", "c"]
    assert refused_row(("hits",), {"slots": 2}, "why") == {
        **{"hits": None, "slots": 2, "refused": "why"}
    }


def test_a_reason_is_one_line_under_a_table() -> None:
    assert refusal_notes({"belady": "needs\n  the future"}) == [
        "belady: could not run: needs the future"
    ]
