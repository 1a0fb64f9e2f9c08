"""The checks of rows, wherever a trace is cut into batches, with their messages word for word."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moeroute import Rows, TraceError, TraceMeta
from moeroute.check import RowChecker, check_names
from moeroute.schema import NO_EXPERT, rows_from_columns
from support.tracekit import make_meta, make_rows

META = make_meta(horizon=1)
ROWS = make_rows(META)  # 2 sequences of 5 tokens of 3 layers
N = len(ROWS)


def taken(rows: Rows, indices: list[int]) -> Rows:
    return rows_from_columns({name: column[indices] for name, column in rows.columns().items()})


def checked(rows: Rows, *cuts: int, meta: TraceMeta = META) -> RowChecker:
    """The checker that was given ``rows`` in batches that end at ``cuts``."""
    checker = RowChecker(meta, "here")
    edges = [0, *sorted(cuts), len(rows)]
    for start, stop in pairwise(edges):
        checker.add(rows.slice(start, stop))
    checker.finish()
    return checker


cuts = st.lists(st.integers(0, N), max_size=3)


@given(cuts)
def test_batches_may_end_anywhere(cuts: list[int]) -> None:
    checker = checked(ROWS, *cuts)
    assert (checker.n_rows, checker.missing_rows) == (N, 0)


@given(st.sets(st.integers(0, N - 1), min_size=1, max_size=4), cuts)
def test_missing_rows_are_counted_wherever_batches_end(gone: set[int], cuts: list[int]) -> None:
    """A token without any row is not known to be missing: of each at least one stays here."""
    kept = [i for i in range(N) if i not in gone or i % 3 == 1]
    n_gone = N - len(kept)
    left = taken(ROWS, kept)
    some = [min(cut, len(left)) for cut in cuts]
    assert checked(left, *some, meta=replace(META, missing_rows=n_gone)).missing_rows == n_gone
    with pytest.raises(TraceError) as caught:
        checked(left, *some, meta=replace(META, missing_rows=n_gone + 1))
    assert str(caught.value) == (
        f"here: {n_gone} (token, layer) rows are missing; the metadata says {n_gone + 1}"
    )


@given(st.integers(0, N - 1), cuts)
def test_a_row_that_is_missing_is_told_by_the_one_after_it(gone: int, cuts: list[int]) -> None:
    left = taken(ROWS, [i for i in range(N) if i != gone])
    with pytest.raises(TraceError) as caught:
        checked(left, *(min(cut, N - 1) for cut in cuts))
    if gone == N - 1:
        assert str(caught.value) == ("here: 1 (token, layer) rows are missing; the metadata says 0")
        return
    at = gone + 1
    assert str(caught.value) == (
        f"here: row {gone}, column layer: rows are missing before (sequence {at // 15}, position "
        f"{at // 3 % 5}, layer {at % 3})"
    )


@given(st.integers(0, N - 2), st.integers(0, N), st.booleans())
def test_a_row_out_of_order_is_told_beside_the_one_before_it(
    first: int, cut: int, twice: bool
) -> None:
    """Two neighbours the other way round, or one row twice: before what is missing is looked at."""
    order = list(range(N))
    order[first : first + 2] = [first, first] if twice else [first + 1, first]
    with pytest.raises(TraceError) as caught:
        checked(taken(ROWS, order), cut)
    before = order[first]
    where = [f"({i // 15}, {i // 3 % 5}, {i % 3})" for i in (first, before)]
    wrong = (
        f"here: row {first + 1}, column sequence, position, layer: {where[0]} does not come after "
        f"{where[1]}"
    )
    # Where the cut parts them, the first batch by itself has a row missing before its last.
    if not twice and cut == first + 1:
        assert "rows are missing before" in str(caught.value)
    else:
        assert str(caught.value) == wrong


def test_nothing_of_a_refused_batch_is_counted() -> None:
    checker = RowChecker(META, "here")
    checker.add(ROWS.slice(0, 4))
    bad = ROWS.slice(4, 9)
    with pytest.raises(TraceError, match="row 6, column phase: 7 is no phase"):
        checker.add(replace(bad, phase=np.array([0, 0, 7, 0, 9], np.uint8)))
    assert checker.n_rows == 4
    checker.add(bad)
    assert checker.n_rows == 9


def told(rows: Rows, meta: TraceMeta = META) -> str:
    checker = RowChecker(meta, "here")
    checker.add(ROWS.slice(0, 3))
    with pytest.raises(TraceError) as caught:
        checker.add(rows)
    return str(caught.value)


def test_what_a_batch_lacks_or_has_too_much_is_told() -> None:
    bad = ROWS.slice(3, 6)
    assert told(replace(bad, input_norm=None)) == (
        "here: column input_norm is not in every batch of rows"
    )
    assert told(replace(bad, predicted=())) == (
        "here: 0 prediction columns; the metadata's horizon is 1"
    )
    for other in ("int64", "uint8", "int16"):  # wider, narrower, as wide
        assert told(replace(bad, layer=bad.layer.astype(other))) == (
            f"here: column layer is {other}[3], not uint16[3]"
        )
    assert told(replace(bad, experts=bad.experts[:, :1])) == (
        "here: column experts is uint16[3, 1], not uint16[3, 2]"
    )
    assert told(replace(bad, layer=bad.layer[:2])) == (
        "here: column layer is uint16[2], not uint16[3]"
    )


def test_the_bounds_are_the_first_numbers_out_of_range() -> None:
    bad = ROWS.slice(3, 6)

    def cells(column: str, value: object) -> Rows:
        changed = getattr(bad, column).copy()
        changed[1] = value
        return replace(bad, **{column: changed})

    assert told(cells("phase", 2)) == "here: row 4, column phase: 2 is no phase"
    assert told(cells("layer", 3)) == (
        "here: row 4, column layer: layer 3 is out of range (there are 3)"
    )
    assert told(cells("experts", [3, 4])) == (
        "here: row 4, column experts: expert 4 is out of range (there are 4)"
    )
    assert told(cells("experts", [3, 3])) == (
        "here: row 4, column experts: expert 3 is there more than once"
    )
    assert told(cells("weights", [0.25, 0.5])) == (
        "here: row 4, column weights: [0.25, 0.5] is not in descending order"
    )
    assert told(cells("weights", [np.inf, 0.5])) == (
        "here: row 4, column weights: [inf, 0.5] is not finite"
    )
    assert told(cells("input_norm", -np.inf)) == (
        "here: row 4, column input_norm: -inf is not finite"
    )
    ahead = bad.predicted[0].copy()
    ahead[1] = [1, np.nan, 1, 1]
    assert told(replace(bad, predicted=(ahead,))) == (
        "here: row 4, column predicted_logits_1: there is a NaN"
    )
    ahead[1] = np.nan  # no prediction
    ahead[2] = [np.inf, -np.inf, 1, 1]
    checker = RowChecker(META, "here")
    checker.add(replace(bad, predicted=(ahead,), weights=np.full((3, 2), 0.5, np.float32)))
    assert checker.n_rows == 3


def test_every_pair_of_a_row_s_experts_is_compared() -> None:
    meta = make_meta(top_k=3)
    rows = make_rows(meta)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        experts = rows.experts.copy()
        experts[7, second] = experts[7, first]
        with pytest.raises(TraceError, match=r"row 7, column experts: .* more than once"):
            checked(replace(rows, experts=experts), meta=meta)


def test_a_required_column_is_named() -> None:
    names = ["sequence", "position", "phase", "layer", "experts"]
    check_names([*names, "extra"], "here")
    for name in names:
        with pytest.raises(TraceError) as caught:
            check_names([other for other in names if other != name], "here")
        assert str(caught.value) == f"here: no column {name}: not a routing trace"


@given(st.integers(0, N - 1), cuts)
def test_the_rows_of_a_token_are_of_one_pass(wrong: int, cuts: list[int]) -> None:
    passes = np.repeat(np.arange(N // 3, dtype=np.uint32)[::-1], 3)  # requests in any order of time
    checked(replace(ROWS, pass_id=passes), *cuts)
    passes[wrong] += 100
    with pytest.raises(TraceError) as caught:
        checked(replace(ROWS, pass_id=passes), *cuts)
    row = max(wrong, wrong // 3 * 3 + 1)  # the first that differs from the row before
    assert str(caught.value) == (
        f"here: row {row}, column pass_id: {passes[row]} where the token's rows before have "
        f"{passes[row - 1]}"
    )


@pytest.mark.parametrize(
    ("experts", "weights", "message"),
    [
        ([NO_EXPERT, NO_EXPERT], [0, 0], "column experts: an expert stands after none"),
        ([NO_EXPERT, 1], [0, 0], "column experts: an expert stands after none"),
        ([1, NO_EXPERT], [0.75, 0.25], "column weights: a weight has no expert"),
        ([1, 1], [0.5, 0.5], "column experts: expert 1 is there more than once"),
        ([1, 8], [0.5, 0.5], "column experts: expert 8 is out of range (there are 4)"),
    ],
)
def test_rows_with_fewer_experts_end_in_none(
    experts: list[int], weights: list[float], message: str
) -> None:
    meta = replace(META, variable_top_k=True)
    assert ROWS.weights is not None
    rows = replace(ROWS, experts=ROWS.experts.copy(), weights=ROWS.weights.copy())
    assert rows.weights is not None
    rows.experts[4], rows.weights[4] = [1, NO_EXPERT], [0.5, 0]
    checked(rows, 2, meta=meta)
    with pytest.raises(TraceError, match=f"row 4, column experts: expert {NO_EXPERT} is out of"):
        checked(rows, 2)
    rows.experts[4], rows.weights[4] = experts, weights
    with pytest.raises(TraceError) as caught:
        checked(rows, 2, meta=meta)
    assert str(caught.value) == f"here: row 4, {message}"


def test_the_number_of_no_expert_is_no_expert() -> None:
    replace(META, n_experts=1 << 16)
    with pytest.raises(TraceError, match=r"n_experts is 65536, not 1\.\.65535"):
        replace(META, n_experts=1 << 16, variable_top_k=True)
    changed = META.to_json().replace('"physical_to_logical":null', '"physical_to_logical":[3]')
    with pytest.raises(TraceError, match="physical_to_logical cannot be"):
        TraceMeta.from_json(changed)
