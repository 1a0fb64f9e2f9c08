"""The paper's Table 2: the rows against their formulas, the fit against itself, the command."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moeroute import open_trace
from moesim import Workload, load_workload
from moesim.engines.compilations import Compilations
from moesim.table2.fit import Curve, Curves, fit
from moesim.table2.published import CARDS, FITTED, PRECISIONS, Algorithm
from moesim.table2.rows import READINGS, Constants, Reading, RowSimulator, decoding
from support.traces import write_trace

LAYERS, EXPERTS, TOP_K = 32, 8, 2
TOKENS = "16"
SIZE = 1_000_000
COPY_S = 0.004  # of an expert of SIZE bytes over LINK
LAYER_S = 0.010
CONSTANTS = Constants(SIZE / COPY_S, LAYER_S)
RELEASED, ONE_WAY_STREAMED = READINGS[0], READINGS[-1]


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(open_trace("mixtral-like"), predictions=True).head(24)


@pytest.fixture(scope="module")
def curves(workload: Workload) -> Curves:
    return Curves(RowSimulator(workload, Compilations()), SIZE)


def seconds(
    workload: Workload, algorithm: Algorithm, reading: Reading, constants: Constants = CONSTANTS
) -> float:
    return RowSimulator(workload, Compilations()).seconds(
        algorithm, reading, constants, slots=4, guesses=1, expert_bytes=SIZE
    )


def lru_misses(workload: Workload, slots: int) -> tuple[int, int]:
    """Misses and evictions of an LRU per layer, one token after the other."""
    held: dict[int, list[int]] = {layer: [] for layer in range(LAYERS)}
    misses = evictions = 0
    for number in range(workload.n_steps):
        step = workload.step(number, detail=False)
        cache = held[step.layer]
        wanted = step.experts.tolist()
        missing = [key for key in wanted if key not in cache]
        misses += len(missing)
        for _ in range(len(cache) + len(missing) - slots):
            cache.remove(next(key for key in cache if key not in wanted))
            evictions += 1
        for key in reversed(wanted):  # the heaviest is the most recent
            if key in cache:
                cache.remove(key)
            cache.append(key)
    return misses, evictions


def test_rows_without_guesses_cost_what_their_formulas_say(workload: Workload) -> None:
    compute = LAYERS * LAYER_S
    misses, evictions = lru_misses(workload, 4)
    moved = {
        (Algorithm.lru, "released"): (misses + evictions) / 24,
        (Algorithm.lru, "one-way"): misses / 24,
        (Algorithm.no_cache, "released"): 2 * TOP_K * LAYERS,
        (Algorithm.no_cache, "one-way"): TOP_K * LAYERS,
        (Algorithm.naive, "released"): EXPERTS * LAYERS,
        (Algorithm.naive, "one-way"): EXPERTS * LAYERS,
    }
    by_name = {reading.name: reading for reading in READINGS}
    for (algorithm, name), copies in moved.items():
        expected = compute + copies * COPY_S
        assert seconds(workload, algorithm, by_name[name]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("copy_s", [COPY_S, LAYER_S / EXPERTS / 2])
def test_streamed_layers_take_the_longer_of_copies_and_compute(
    workload: Workload, copy_s: float
) -> None:
    found = seconds(workload, Algorithm.naive, ONE_WAY_STREAMED, Constants(SIZE / copy_s, LAYER_S))
    # The first token has no layer before it to hide behind.
    assert found == pytest.approx(LAYERS * max(EXPERTS * copy_s, LAYER_S), rel=0.01)


def test_guesses_gain_time_by_copying_beside_compute(workload: Workload) -> None:
    full, lru = (
        seconds(workload, algorithm, RELEASED) for algorithm in (Algorithm.full, Algorithm.lru)
    )
    assert LAYERS * LAYER_S < full < lru


def test_a_curve_goes_on_straight_and_meets_the_simulation(
    workload: Workload, curves: Curves
) -> None:
    line = Curve(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 10.0]))
    np.testing.assert_allclose(line.at(np.array([0.5, 1.5, 4.0])), [4.0, 6.0, 13.0])
    for ratio in (0.37, 0.73, 1.9):
        curve = curves.of(Algorithm.full, RELEASED, slots=4, guesses=1)
        exact = seconds(workload, Algorithm.full, RELEASED, Constants(SIZE / ratio, 1.0))
        assert curve.at(np.array([ratio]))[0] == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("reading", [RELEASED, ONE_WAY_STREAMED])
def test_the_fit_finds_the_constants_that_made_the_data(
    workload: Workload, curves: Curves, reading: Reading
) -> None:
    rows = [curves.of(a, reading, slots=4, guesses=1) for a in Algorithm]
    made = [seconds(workload, a, reading) for a in Algorithm]
    found = fit(rows, made, SIZE, fastest_link=np.inf)
    assert found.constants.link_bytes_per_s == pytest.approx(SIZE / COPY_S, rel=0.01)
    assert found.constants.layer_s == pytest.approx(LAYER_S, rel=0.01)
    assert found.misfit < 0.01


def test_no_link_is_fitted_faster_than_its_kind(workload: Workload, curves: Curves) -> None:
    rows = [curves.of(a, RELEASED, slots=4, guesses=1) for a in Algorithm]
    made = [seconds(workload, a, RELEASED) for a in Algorithm]
    most = 0.8 * SIZE / COPY_S
    found = fit(rows, made, SIZE, fastest_link=most)
    assert found.constants.link_bytes_per_s == pytest.approx(most)
    assert found.asked_link_bytes_per_s == pytest.approx(SIZE / COPY_S, rel=0.01)
    free = fit(rows, made, SIZE, fastest_link=np.inf)
    assert found.misfit > free.misfit
    assert found.constants.layer_s < free.constants.layer_s


def test_prompts_are_left_out(tmp_path: Path) -> None:
    tokens = [(0, phase, [[e], [e]]) for e, phase in ((0, 0), (1, 0), (2, 1), (3, 1))]
    whole = load_workload(open_trace(write_trace(tmp_path / "t.parquet", tokens, 4)))
    part = decoding(whole)
    assert part.keys.tolist() == [2, 6, 3, 7]
    assert part.offsets.tolist() == [0, 1, 2, 3, 4]
    assert (part.n_prompt, part.n_decoded) == (0, 2)


def moesim(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def table2(*arguments: str | Path) -> Any:
    done = moesim("table2", "lru-spec", "belady", "--format", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> Any:
    return table2("--tokens", TOKENS)


def test_every_cell_is_there_and_the_misprint_is_left_out(found: Any) -> None:
    cells = found["cells"]
    places = {(cell["precision"], cell["algorithm"], cell["gpu"]) for cell in cells}
    assert len(cells) == len(places) == 32
    assert {precision for precision, _, _ in places} == set(PRECISIONS)
    roles = {role: [c for c in cells if c["role"] == role] for role in ("fitted", "predicted")}
    assert len(roles["fitted"]) == 16
    assert all(cell["precision"] == FITTED for cell in roles["fitted"])
    excluded = [cell for cell in cells if cell["role"] == "excluded"]
    assert [cell["published_tokens_per_s"] for cell in excluded] == [1.791]
    for role, rows in roles.items():
        errors = [abs(c["simulated_tokens_per_s"] / c["published_tokens_per_s"] - 1) for c in rows]
        assert found[f"median_error_{role}"] == pytest.approx(np.median(errors))
    assert any("1.791" in sentence for sentence in found["unexplained"])


def test_the_goal_of_the_predictions_is_met(found: Any) -> None:
    assert found["median_error_predicted"] < 0.10


def test_links_are_no_faster_than_the_data_sheet(found: Any) -> None:
    assert [row["gpu"] for row in found["constants"]] == [card.name for card in CARDS]
    for row in found["constants"]:
        assert 0 < row["link_bytes_per_s"] <= row["data_sheet_link_bytes_per_s"] * (1 + 1e-9)
        assert row["layer_s"] > row["data_sheet_layer_s"]


def test_what_is_unexplained_follows_from_the_numbers(found: Any) -> None:
    said = " ".join(found["unexplained"])
    beyond = [
        row["gpu"]
        for row in found["constants"]
        if row["asked_link_bytes_per_s"] > row["data_sheet_link_bytes_per_s"]
    ]
    assert ("faster than their kind" in said) == bool(beyond)
    cells = found["cells"]
    predicted = [cell for cell in cells if cell["role"] == "predicted"]
    far = sum(abs(cell["error"]) > 0.10 for cell in predicted)
    assert (f"{far} of {len(predicted)} predicted cells" in said) == bool(far)
    paper = {(c["precision"], c["algorithm"], c["gpu"]): c["published_tokens_per_s"] for c in cells}
    unmodelled = [
        paper[FITTED, c["algorithm"], c["gpu"]] / c["published_tokens_per_s"] - 1 for c in predicted
    ]
    assert found["median_error_unmodelled"] == pytest.approx(np.median(np.abs(unmodelled)))
    best = min(found["readings"], key=lambda row: row["misfit"])
    assert (f"The reading '{best['reading']}'" in said) == (best["reading"] != found["reading"])


def test_this_engine_stays_within_the_limit(found: Any) -> None:
    assert len(found["this_engine"]) == 8
    for row in found["this_engine"]:
        assert set(row["simulated_tokens_per_s"]) == {"lru-spec", "belady"}
        assert row["best_policy"] == "lru-spec"  # belady knows the future
        fastest = max(row["simulated_tokens_per_s"].values())
        assert fastest <= row["limit_tokens_per_s"] <= row["compute_limit_tokens_per_s"] * 1.0001


@pytest.mark.slow
def test_a_second_run_has_the_same_cells_in_csv(found: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.csv"
    done = moesim("table2", "lru", "--tokens", TOKENS, "--format", "csv", "--out", out)
    assert (done.returncode, done.stdout) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert len(rows) == len(found["cells"])
    for row, cell in zip(rows, found["cells"], strict=True):
        assert {name: row[name] for name in cell} == {k: str(v) for k, v in cell.items()}


@pytest.mark.slow
def test_another_reading_as_a_table() -> None:
    table = moesim("table2", "lru", "--tokens", "4", "--reading", "one-way-streamed").stdout
    assert "Reading 'one-way-streamed'" in table
    assert table.count("(left out)") == 1
    assert "Left unexplained" in table


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["--trace", "tiny"],
            1,
            "the table is Mixtral-8x7B's, 32 layers and the top 2 of 8 experts",
        ),
        (["--reading", "relased"], 2, "unknown reading 'relased'; did you mean 'released'?"),
        (["lur"], 2, "unknown policy 'lur'; did you mean 'lru'?"),
        (["--tokens", "0"], 2, "tokens must be 1 or more, not 0"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: list[str], code: int, says: str) -> None:
    done = moesim("table2", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
