"""Charts hold the numbers of the tables; files hold the charts, in the themes they promise."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import moesim
import moesim.cli
import polars as pl
import pytest
from moesim.errors import SimulationError
from moesim.pictures import tables
from moesim.pictures.colours import TONES, PolicyMarks, dark_of
from moesim.pictures.drawing import check_picture, in_dark, svg, write_picture
from moesim.pictures.lines import BANDWIDTH, SPEED, policy_lines
from support.browser import first_pixel, needs_chromium

SLOTS = (3, 4, 6)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    policies = ["lru", "lru-spec", "belady", "moe-eras"]
    frame = moesim.compare("tiny", policies, slots=SLOTS, machine="cpu-disk", tokens=150)
    return frame.to_dicts()


def values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All data of a chart, from its panels and layers."""
    own = spec.get("data", {}).get("values", [])
    named = [row for each in spec.get("datasets", {}).values() for row in each]
    parts = [spec.get(kind, []) for kind in ("layer", "concat", "hconcat", "vconcat")]
    return [*own, *named, *(row for part in parts for each in part for row in values(each))]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """A command of moesim; its stdout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moesim", *arguments])
        with pytest.raises(SystemExit) as left:
            moesim.cli.main()
    found = capsys.readouterr()
    assert not left.value.code, found.err
    return found.out


def test_a_comparison_is_drawn_as_it_is_printed(rows: list[dict[str, Any]]) -> None:
    drawn = values(tables.compared(rows, "simulated", "here"))
    speeds = {(one["policy"].rstrip(" *"), one["slots"]): one["tokens_per_s"] for one in drawn}
    for row in rows:
        assert speeds[row["policy"], row["slots"]] == row["tokens_per_s"]
    for slots in SLOTS:
        limits = [row["limit_tokens_per_s"] for row in rows if row["slots"] == slots]
        assert speeds["limit", slots] == max(limits)
    assert "moe-eras*" in {one["policy"] for one in drawn}  # lossy, as in the table


def test_a_picture_names_experts_that_are_not_the_models_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Else a small model's routing with Mixtral's bytes reads as the small model's speed."""
    plot = tmp_path / "c.svg"
    for given, named in (("93671424", True), ("196608", False)):
        options = ("--slots", "3,4", "--tokens", "50", "--machine", "t4", "--expert-bytes", given)
        run(capsys, "compare", "lru", "lfu", *options, "--plot", str(plot), "--force")
        assert ("constants), experts of 93.671 MB" in plot.read_text()) == named


def test_one_size_is_drawn_as_bars(rows: list[dict[str, Any]]) -> None:
    spec = tables.compared([row for row in rows if row["slots"] == 4], "simulated", "here")
    assert {row["policy"] for row in values(spec)} == {*(r["policy"] for r in values(spec))}
    assert "bar" in json.dumps(spec)
    assert "line" not in {part["mark"]["type"] for part in spec["hconcat"][0]["layer"]}
    assert "4 slots a layer" in json.dumps(spec)


def test_speeds_begin_at_zero_and_the_limit_is_dashed(rows: list[dict[str, Any]]) -> None:
    """Also where all are nearly as fast, and in the legend, whose marks are the points'."""
    near = [row | {"tokens_per_s": 99.0, "limit_tokens_per_s": 100.0} for row in rows]
    spec = tables.compared(near, "simulated", "here")
    line, points = spec["layer"]
    assert line["encoding"]["y"]["scale"]["zero"] is True
    dash = line["encoding"]["strokeDash"]["condition"][0]
    assert dash["test"] == "datum.policy == 'limit'"
    assert dash["value"] != [1, 0]
    shapes = points["encoding"]["shape"]["scale"]
    marks = dict(zip(shapes["domain"], shapes["range"], strict=True))
    assert marks["limit"].count("Z") == 2  # two dashes


def test_every_label_is_under_its_tick() -> None:
    """The first and the last, too, where the axis begins and ends with them."""
    speeds = [
        {"policy": "lru", "link_gb_per_s": gb, "tokens_per_s": 9.0 * gb} for gb in (1.5, 3.5, 7.5)
    ]
    marks = PolicyMarks.of(["lru"])
    drawn = svg(policy_lines(speeds, BANDWIDTH, SPEED, marks, title="Speed", subtitle="by link"))
    labels = re.findall(r'<text text-anchor="(\w+)"[^>]*>([\d.]+)</text>', drawn)
    assert {text: anchor for anchor, text in labels if "." in text} == {
        "1.5": "middle",
        "3.5": "middle",
        "7.5": "middle",
    }


def test_without_times_hit_ratios_are_drawn(rows: list[dict[str, Any]]) -> None:
    untimed = [row | {"tokens_per_s": None, "limit_tokens_per_s": None} for row in rows]
    drawn = values(tables.compared(untimed, "simulated", "here"))
    ratios = {(one["policy"].rstrip(" *"), one["slots"]): one["hit_ratio"] for one in drawn}
    assert all(ratios[row["policy"], row["slots"]] == row["hit_ratio"] for row in rows)


def test_nothing_to_draw_is_said(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(SimulationError, match="nothing to draw"):
        tables.compared([row | {"hit_ratio": None} for row in rows], "simulated", "here")


def test_a_curve_is_drawn_as_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "curve", "lru", "lfu", "--format", "json", "--plot", str(tmp_path / "c.svg"))
    printed = json.loads(out)
    drawn = values(tables.curves(printed, "simulated", "tiny"))
    found = {(one["policy"], one["slots"], one["shuffled"]): one["hit_ratio"] for one in drawn}
    for row in printed:
        assert found[row["policy"], row["slots"], False] == row["hit_ratio"]
        assert found[row["policy"], row["slots"], True] == row["shuffled_hit_ratio"]
        assert found["limit", row["slots"], False] == row["limit_hit_ratio"]
    text = (tmp_path / "c.svg").read_text()
    assert "prefers-color-scheme:dark" in text
    assert f"hit ratio: {printed[0]['hit_ratio']:.0%}" in text  # under the pointer


@pytest.mark.slow
def test_a_sweep_is_drawn_with_a_panel_a_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "s.parquet", tmp_path / "s.pdf"
    options = ["--slots", "2,4", "--machine", "t4,cpu-disk", "--no-limits"]
    run(capsys, "sweep", "lru", "lfu", *options, "--out", str(out), "--plot", str(plot))
    assert plot.read_bytes().startswith(b"%PDF")
    rows = pl.read_parquet(out).to_dicts()
    spec = tables.swept(rows)
    assert [panel["title"]["text"] for panel in spec["concat"]] == ["t4", "cpu-disk"]
    speeds = sorted(one["tokens_per_s"] for one in values(spec))
    assert speeds == sorted(row["tokens_per_s"] for row in rows)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf", ".html"])
def test_every_format_is_written(suffix: str, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    chart = tables.compared(rows[:2], "simulated", "here")
    write_picture(tmp_path / f"a{suffix}", chart, "A & B")
    begins = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF", ".html": b"<!doctype html>"}
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(begins[suffix])
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_a_dark_chart_has_no_light_colour(rows: list[dict[str, Any]]) -> None:
    chart = tables.compared(rows, "simulated", "here")
    light, dark = json.dumps(chart), json.dumps(in_dark(chart))
    used = [colour for colour in dark_of() if colour in light]
    assert len(used) >= 4
    assert all(dark_of()[colour] in dark for colour in used)
    assert not [colour for colour in used if colour in dark]


def test_without_the_extra_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SimulationError, match=r"moe-offload-lab\[plots\]"):
        check_picture(tmp_path / "a.png", force=False)


@needs_chromium
def test_a_browser_shows_the_picture_as_its_reader_prefers(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    page = tmp_path / "a.html"
    write_picture(page, tables.compared(rows, "simulated", "here"), "A")
    for dark in (False, True):
        tone = TONES["dark" if dark else "light"].page
        expected = tuple(int(tone[i : i + 2], 16) for i in (1, 3, 5))
        assert first_pixel(page, tmp_path, dark=dark) == expected
