"""`moerun perplexity`: each token once, the stock model's numbers, and nothing measured twice."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from moepolicy import console, find_policy
from moerun.checkpoint.hub import resolve
from moerun.commands.perplexity import held_out_text
from moerun.perplexity import measure as perplexity
from moerun.perplexity.measure import Measurement
from moerun.perplexity.results import Results
from moerun.perplexity.windows import nats, windows
from moerun.settings import Settings
from moerun.store.pack import pack
from support.commands import Call, caller
from support.moe_models import random_model, save_checkpoint

CONTEXT = 64
PATIENCE_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("mixtral", vocab_size=4096, intermediate_size=64)
    return save_checkpoint(model, resolve("tiny"), tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(held_out_text()[:9000], encoding="utf-8")
    return path


@pytest.fixture
def moerun(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, "perplexity", home=home)


@given(n=st.integers(0, 400), context=st.integers(2, 50), data=st.data())
def test_every_token_is_scored_once_with_something_before_it(
    n: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for window in windows(n, context, stride):
        assert window.begin < window.first < window.end <= window.begin + context
        if window.begin:
            assert window.first - window.begin >= min(context - stride, 1)
        scored += range(window.first, window.end)
    left_out = range(0, n, stride) if stride == context else range(min(n, 1))
    assert scored == [i for i in range(n) if i not in left_out]


def test_windows_spelled_out() -> None:
    disjoint = [(w.begin, w.first, w.end) for w in windows(10, 4, 4)]
    assert disjoint == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]
    overlapping = [(w.begin, w.first, w.end) for w in windows(10, 4, 2)]
    assert overlapping == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]


@pytest.mark.parametrize("stride", [CONTEXT, 24])
def test_the_numbers_are_the_stock_models(
    checkpoint: Path, text: Path, tmp_path: Path, stride: int
) -> None:
    content = text.read_text()
    settings = Settings(find_policy("lru"), slots=2)
    measurement = Measurement(str(checkpoint), content, settings, stride=stride, tokens=500)
    assert measurement.context == CONTEXT
    store = pack(checkpoint, tmp_path / "store")
    told: list[None] = []
    with Results(tmp_path / "out.jsonl", measurement.identity) as results:
        cell = measurement.measure(
            store, "native", "native", settings.policy, results, lambda: told.append(None)
        )

    stock = tf.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(content, return_tensors="pt").input_ids[:, :500]
    losses: list[float] = []
    scored = 1
    for begin in range(0, 500, stride):
        end = min(begin + CONTEXT, 500)
        with torch.no_grad():
            logits = stock(ids[:, begin:end]).logits[0, :-1].double()
        picked = -logits.log_softmax(-1).gather(1, ids[0, begin + 1 : end, None])[:, 0]
        losses += picked[max(scored - begin - 1, 0) :].tolist()
        scored = end
        if end == 500:
            break
    assert cell.scored_tokens == len(losses)
    mean = math.fsum(losses) / len(losses)
    assert cell.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    n_bytes = len(tokenizer.decode(ids[0]).encode())
    assert cell.bits_per_byte == pytest.approx(mean / math.log(2) * 500 / n_bytes, rel=1e-5)
    assert len(told) == len(measurement.windows)
    files = sum(f.stat().st_size for f in store.path.glob("*.safetensors"))
    assert 0 <= files - cell.store_bytes <= 4 * 4096  # the headers of the experts' files


def test_the_bundled_model_predicts_the_text_it_was_not_trained_on(moerun: Call) -> None:
    code, out, err = moerun(
        *("--attention", "native", "--experts", "native", "--tokens", "1500"),
        *("--format", "json"),
    )
    assert code == 0, err
    found = json.loads(out)
    (cell,) = found["cells"]
    assert 10 < cell["perplexity"] < 60
    assert cell["published"] is None
    assert (found["context"], cell["policy"], found["kind"]) == (512, "lru", "measured")


@pytest.mark.slow
def test_precisions_of_one_size_are_explained(
    moerun: Call, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (text, "--tokens", "30", "--context", "30", "--attention", "2bit,3bit")
    code, table, err = moerun(*arguments, "--experts", "4bit,3bit,2bit")
    assert code == 0, err
    told = [line for line in table.splitlines() if "alike" in line]
    # An expert has 98,304 weights; scale and zero, of 8 bits, are of 64 of them or of 16.
    assert told[0].startswith("attention: 2bit and 3bit take 0.201 MB alike, ")
    assert told[1].startswith("experts: 3bit and 2bit take 2.621 MB alike, ")
    assert "whole pages of 4,096 bytes; without that 2.562 MB and 2.384 MB (" in told[1]
    assert len(told) == 2
    code, table, err = moerun(*arguments, "--experts", "4bit,3bit", "--attention", "2bit")
    assert code == 0, err
    assert "alike" not in table


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


GRID = ("--attention", "native,4bit", "--experts", "native,2bit")


@pytest.mark.slow
def test_a_killed_measurement_goes_on_with_the_window_it_was_at(
    moerun: Call, home: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home / "killed.jsonl"
    journal = home / "killed.jsonl.windows"
    arguments = (str(text), "--model", str(checkpoint), *GRID)
    command = [sys.executable, "-c", "from moerun.cli import main; main()", "perplexity"]
    killed = subprocess.Popen(
        [*command, *arguments, "--out", str(out)],
        env=environment(home),
        stderr=subprocess.DEVNULL,
    )
    total = 4 * -(-len_of(checkpoint, text) // CONTEXT)
    deadline = time.monotonic() + PATIENCE_S
    while not journal.exists() or journal.read_text().count("\n") < total // 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    lines = journal.read_text().splitlines()
    assert total // 3 <= len(lines) < total
    done = [tuple(json.loads(line)[:4]) for line in lines if line.endswith("]")]
    cells = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [(c["attention"], c["experts"]) for c in cells] == [("native", "native")]

    measured = Mock(side_effect=nats)
    monkeypatch.setattr(perplexity, "nats", measured)
    code, printed, err = moerun(*arguments, "--out", out, "--format", "json")
    assert code == 0, err
    assert "1 of 4 cells are in" in err
    assert measured.call_count == total - len(done)
    assert not journal.exists()
    code, again, err = moerun(*arguments, "--out", out, "--format", "json")
    assert (code, again) == (0, printed)
    assert measured.call_count == total - len(done)  # nothing more
    code, whole, _ = moerun(*arguments, "--format", "json")
    assert [without_sums(c) for c in json.loads(whole)["cells"]] == [
        without_sums(c) for c in json.loads(printed)["cells"]
    ]


def without_sums(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | {name: round(cell[name], 4) for name in ("perplexity", "bits_per_byte", "nats")}


def len_of(checkpoint: Path, text: Path) -> int:
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    return len(tokenizer(text.read_text()).input_ids)


@pytest.mark.slow
def test_an_interrupted_measurement_says_how_to_go_on(
    moerun: Call, tmp_path: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = nats, [3]

    def interrupted(*arguments: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(perplexity, "nats", interrupted)
    arguments = (text, "--model", checkpoint, *GRID, "--out", tmp_path / "out.jsonl")
    code, out, err = moerun(*arguments)
    assert (code, out) == (console.INTERRUPTED, "")
    assert "the same command goes on" in err
    monkeypatch.setattr(perplexity, "nats", real)
    code, out, err = moerun(*arguments)
    assert code == 0, err
    assert "going on after window 3 of" in err


def test_the_formats_agree(moerun: Call, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    arguments = (text, "--model", checkpoint, *GRID, "--tokens", "300", "--slots", "1")
    code, table, err = moerun(*arguments)
    assert code == 0, err
    assert "published" not in table
    assert "300 (" in table
    rows = list(csv.DictReader(io.StringIO(moerun(*arguments, "--format", "csv")[1])))
    cells = json.loads(moerun(*arguments, "--format", "json")[1])["cells"]
    assert [(r["attention"], r["experts"]) for r in rows] == [
        ("native", "native"),
        ("native", "2bit"),
        ("4bit", "native"),
        ("4bit", "2bit"),
    ]
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["perplexity"]) == cell["perplexity"]
        assert row["published_wikitext2"] == ""
        assert f"{cell['perplexity']:.4f}" in table
    sizes = [cell["store_bytes"] for cell in cells]
    assert sizes[0] > max(sizes[1:]) >= min(sizes[:3]) > sizes[3]


def test_a_packed_store_is_measured_at_its_own_precisions(
    moerun: Call, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    store = pack(checkpoint, tmp_path / "store", precision="2bit", attention="4bit").path
    arguments = (text, "--model", store, "--tokens", "200", "--out", tmp_path / "out.jsonl")
    code, out, err = moerun(*arguments, "--format", "json")
    assert code == 0, err
    (cell,) = json.loads(out)["cells"]
    assert (cell["attention"], cell["experts"]) == ("4bit", "2bit")
    code, _, err = moerun(*arguments, "--experts", "3bit")
    assert code == 1
    assert "is a store with 4bit attention and 2bit experts" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "4bit,5bit"), "there is no precision '5bit'"),
        (("--attention", "1bit"), "there is no precision '1bit'"),
        (("--context", "1000"), "context must be 2 or more and at most the model's 64, not 1000"),
        (("--context", "1"), "context must be 2 or more"),
        (("--stride", "65"), "stride must be 1 to the context of 64, not 65"),
        (("--tokens", "1"), "tokens must be 2 or more, not 1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_packed(
    moerun: Call, checkpoint: Path, text: Path, arguments: tuple[str, str], message: str
) -> None:
    code, out, err = moerun(text, "--model", checkpoint, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_texts_that_cannot_be_read(moerun: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    (tmp_path / "short").write_text("a")
    for name, message in (
        ("binary", "is no UTF-8 text"),
        ("short", "short has 1 tokens: give a text of 2 or more"),
        ("missing", "is not there"),
    ):
        code, _, err = moerun(tmp_path / name, "--model", checkpoint)
        assert code == 1
        assert message in err


def test_results_of_another_measurement_are_not_mixed_in(
    moerun: Call, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = (text, "--model", checkpoint, "--attention", "native", "--experts", "native")
    code, _, err = moerun(*arguments, "--tokens", "200", "--out", out)
    assert code == 0, err
    kept = out.read_bytes()
    code, _, err = moerun(*arguments, "--tokens", "201", "--out", out)
    assert code == 1
    assert "holds results of another measurement" in err
    (tmp_path / "thesis.jsonl").write_text("important")
    code, _, err = moerun(*arguments, "--out", tmp_path / "thesis.jsonl")
    assert code == 1
    assert "holds no results of 'moerun perplexity'" in err
    assert (out.read_bytes(), (tmp_path / "thesis.jsonl").read_text()) == (kept, "important")
