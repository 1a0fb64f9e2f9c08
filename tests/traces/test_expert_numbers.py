"""How many experts a layer has, where the file of another recorder does not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from moeroute import Trace, TraceError
from moeroute.importers import ImportOptions, import_foreign
from moeroute.sizes import GivenSizes

LIKE = GivenSizes("mixtral-8x7b")  # 32 layers of 8 experts, top-2
TOKENS = 20


@pytest.fixture
def recording(tmp_path: Path) -> Callable[[Callable[[int], list[int]]], Path]:
    """A file with the experts of each token, the same in all of 32 layers."""

    def write(experts: Callable[[int], list[int]]) -> Path:
        path = tmp_path / "r.jsonl"
        rows = [
            {"layer": layer, "token": token, "experts": experts(token)}
            for token in range(TOKENS)
            for layer in range(32)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def imported(path: Path, sizes: GivenSizes | None = None, n_experts: int | None = None) -> Trace:
    return import_foreign(
        path,
        path.with_suffix(".parquet"),
        options=ImportOptions(n_experts=n_experts),
        sizes=sizes or GivenSizes(),
    )


def test_an_expert_that_was_never_chosen_counts_where_its_number_is_known(
    recording: Callable[..., Path],
) -> None:
    path = recording(lambda token: [token % 6, 6 - token % 3 % 2])  # ids 0 to 6
    assert imported(path).meta.n_experts == 7
    assert imported(path, n_experts=16).meta.n_experts == 16
    like = imported(path, LIKE).meta
    assert (like.n_experts, like.n_shared_experts) == (8, 0)


def test_an_expert_in_every_row_is_no_shared_one_where_all_are_known(
    recording: Callable[..., Path],
) -> None:
    path = recording(lambda token: [7, token % 7])
    guessed = imported(path).meta
    assert (guessed.n_experts, guessed.top_k, guessed.n_shared_experts) == (7, 1, 1)
    like = imported(path, LIKE).meta
    assert (like.n_experts, like.top_k, like.n_shared_experts) == (8, 2, 0)


def test_experts_beyond_the_number_are_shared_ones_or_an_error(
    recording: Callable[..., Path],
) -> None:
    fused = recording(lambda token: [token % 8, (token + 3) % 8, 8])
    meta = imported(fused, n_experts=8).meta
    assert (meta.n_experts, meta.top_k, meta.n_shared_experts) == (8, 2, 1)
    beyond = recording(lambda token: [token % 9, (token + 3) % 9])
    with pytest.raises(
        TraceError, match=r"has expert 8, and --experts or --like says .* 8: 0 to 7"
    ):
        imported(beyond, n_experts=8)
    assert not beyond.with_suffix(".parquet.partial").exists()
