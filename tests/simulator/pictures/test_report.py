"""`moesim report`: one page with all pictures, whose numbers are the commands' own."""

from __future__ import annotations

import csv
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import moesim
import moesim.cli
import pytest
from moeroute import open_trace
from moeroute.statistics import locality, popularity, read_routing, recall
from support.browser import dom, first_pixel, needs_chromium

NAMES = ["hit-ratio", "speed-by-memory", "speed-by-link", "time", "timeline", "expert-use"]
NAMES += ["locality", "recall"]
SHOWN = ("lru", "lru-spec", "foresight", "belady")


def report(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moesim", "report", *arguments])
        with pytest.raises(SystemExit) as left:
            moesim.cli.main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with its pictures."""
    path = tmp_path_factory.mktemp("report")
    options = ["--policies", " ".join(SHOWN), "--machine", "cpu-disk", "--tokens", "150"]
    arguments = ["tiny", "--out", str(path / "r.html"), "--pictures", str(path / "p"), *options]
    assert report(*arguments, "--slots", "4") == 0
    return path


def numbers(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "p" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


class Links(HTMLParser):
    """Collects what a page would load, and its sections and svgs."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.sections: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            if name in found:
                self.loaded.append(str(found[name]))
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "section":
            self.sections.append(str(found["id"]))


def test_the_page_has_every_picture_and_loads_nothing(folder: Path) -> None:
    text = (folder / "r.html").read_text()
    page = Links()
    page.feed(text)
    assert page.sections == NAMES
    assert all(link.startswith("#") for link in page.loaded)
    assert len(page.ids) == len(set(page.ids))
    assert "<script" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count("<svg") == len(NAMES)


def test_every_number_says_what_it_is(folder: Path) -> None:
    text = (folder / "r.html").read_text()
    kinds = re.findall(r'<span class="kind">([^<]*)</span>', text)
    assert kinds == ["simulated, recorded routing"] * 5 + ["recorded routing"] * 3
    assert "measured constants" in text


def test_its_numbers_are_those_of_a_comparison(folder: Path) -> None:
    frame = moesim.compare("tiny", list(SHOWN), slots=4, machine="cpu-disk", tokens=150)
    expert = next(iter(open_trace("tiny").meta.expert_bytes.values()))
    rows = numbers(folder, "speed-by-memory")
    here = {row["policy"]: row for row in rows if float(row["memory_mb"]) * 1e6 == 4 * 8 * expert}
    for one in frame.to_dicts():
        assert float(here[one["policy"]]["tokens_per_s"]) == one["tokens_per_s"]
    assert float(here["limit"]["tokens_per_s"]) == frame["limit_tokens_per_s"].max()
    links = [row for row in numbers(folder, "speed-by-link") if row["link_gb_per_s"] == "1.1"]
    assert {float(row["tokens_per_s"]) for row in links} == {
        *frame["tokens_per_s"],
        frame["limit_tokens_per_s"].max(),
    }
    ratios = {(r["policy"], r["slots"], r["shuffled"]): r for r in numbers(folder, "hit-ratio")}
    for one in frame.to_dicts():
        if one["policy"] == "lru-spec":  # what it fetched ahead hits, too
            assert ("lru-spec", "4", "False") not in ratios
        else:
            assert float(ratios[one["policy"], "4", "False"]["hit_ratio"]) == one["hit_ratio"]


def test_the_parts_of_the_time_are_the_whole(folder: Path) -> None:
    frame = moesim.compare("tiny", list(SHOWN), slots=4, machine="cpu-disk", tokens=150)
    for one in frame.to_dicts():
        rows = [row for row in numbers(folder, "time") if row["policy"] == one["policy"]]
        parts = {row["part"]: float(row["ms_per_token"]) for row in rows}
        assert sum(parts.values()) == pytest.approx(1e3 * one["time_s"] / 150)
        assert parts["waiting for experts"] == pytest.approx(1e3 * one["stall_s"] / 150)
        assert min(parts.values()) > 0


def test_lanes_do_one_thing_at_a_time_in_the_order_of_layers(folder: Path) -> None:
    rows = numbers(folder, "timeline")
    assert {row["policy"] for row in rows} == {"lru", "lru-spec"}
    for policy in ("lru", "lru-spec"):
        lane = [r for r in rows if r["policy"] == policy and r["lane"] == "compute"]
        ends = 0.0
        for row in sorted(lane, key=lambda r: float(r["begin_ms"])):
            assert float(row["begin_ms"]) >= ends - 1e-9
            ends = float(row["end_ms"])
        layers = [int(r["layer"]) for r in lane if r["what"] == "layers and gates"]
        assert layers == [*range(8), *range(8)]


def test_its_statistics_are_those_of_the_trace(folder: Path) -> None:
    trace = open_trace("tiny")
    routing = read_routing(trace)
    shares = popularity(routing).shares
    for row in numbers(folder, "expert-use"):
        assert float(row["share"]) == shares[int(row["layer"]), int(row["expert"])]
    kept = [row for row in numbers(folder, "locality") if row["copy"] == "as recorded"]
    found = [float(row["share"]) for row in kept]
    assert found == pytest.approx(locality(routing).mean.tolist())
    ahead = [row for row in numbers(folder, "recall") if row["ahead"] == "2 layers ahead"]
    found = [float(row["recall"]) for row in ahead]
    assert found == pytest.approx(recall(trace).mean[1].tolist())


def test_a_synthetic_trace_is_called_so_everywhere(tmp_path: Path) -> None:
    options = ["--tokens", "20", "--policies", "lru belady", "--precision", "2bit", "--slots", "4"]
    assert report("mixtral-like", "--out", str(tmp_path / "r.html"), *options) == 0
    text = (tmp_path / "r.html").read_text()
    kinds = re.findall(r'<span class="kind">([^<]*)</span>', text)
    assert all("synthetic" in kind for kind in kinds)
    assert "mixtral-8x7b (synthetic)" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tiny", "--out", "{}/r.txt"], 2, "suffix"),
        (["tiny", "--out", "{}/none/r.html"], 1, "does not exist"),
        (["tiny", "--out", "{}/r.html", "--pictures", "{}"], 2, "exists already"),
        (["tiny", "--out", "{}/r.html", "--policies", " "], 2, "empty"),
        (["nothing", "--out", "{}/r.html"], 2, "no trace 'nothing'"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(*(each.format(tmp_path) for each in arguments)) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@needs_chromium
def test_a_browser_opens_it_without_a_network(folder: Path) -> None:
    shown = dom(folder / "r.html", folder)
    assert shown.count("<svg") == len(NAMES)
    assert first_pixel(folder / "r.html", folder, dark=True) == (0x15, 0x18, 0x1C)
    assert first_pixel(folder / "r.html", folder, dark=False) == (255, 255, 255)


def test_the_sentence_fits_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    options = ("--policies", "lru lru-spec", "--tokens", "60", "--slots", "4")
    assert report("tiny", "--out", str(tmp_path / "r.html"), *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is the fastest policy that runs live" in " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 60
