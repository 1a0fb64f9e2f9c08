"""The bundled model predicts text better than compressors do, and routes as a real one does."""

from __future__ import annotations

import gzip
import importlib
import lzma
import math
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from moeroute import Trace, open_trace
from moeroute.statistics import locality, popularity, read_routing, recall
from moetrace.model import Checkpoint

ROOT = Path(__file__).parents[2]
# The end of Project Gutenberg 1342 (Pride and Prejudice, public domain), cut at a paragraph. It is
# of the last 5 % of the book, which the model's training left out (see the model's card).
PROSE = Path(__file__).with_name("pride_and_prejudice_end.txt")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "runtime" / "training"))
    return importlib.import_module("tiny_evaluate")


@pytest.fixture(scope="module")
def sample() -> Trace:
    return open_trace("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prose", "code"])
def test_it_needs_fewer_bits_than_gzip_and_xz(
    tiny: Checkpoint, evaluate: ModuleType, kind: str
) -> None:
    path = PROSE if kind == "prose" else Path(zipfile.__file__)
    text = path.read_text(encoding="utf-8")[-20_000:]
    raw = text.encode()
    with torch.inference_mode():
        model_bytes = evaluate.nats(tiny, text) / math.log(2) / 8
        with evaluate.random_experts(tiny, seed=0):
            random_bytes = evaluate.nats(tiny, text) / math.log(2) / 8
    assert model_bytes < 0.9 * len(lzma.compress(raw, preset=9))
    assert model_bytes < 0.9 * len(gzip.compress(raw, 9))
    assert random_bytes > 1.3 * model_bytes


def test_experts_repeat_more_than_by_chance(sample: Trace) -> None:
    routing = read_routing(sample)
    assert locality(routing).mean[0] > 1.3 * locality(routing.shuffled(0)).mean[0]


def test_no_layer_has_collapsed(sample: Trace) -> None:
    assert popularity(read_routing(sample)).entropy.min() > 0.95


def test_gates_foresee_later_layers(sample: Trace) -> None:
    one, two, three = recall(sample, [2]).mean[:, 0]
    assert one > two > three > 0.6


def test_prose_and_code_use_different_experts(sample: Trace) -> None:
    routing = read_routing(sample)
    sequence = routing.token[:, 0] >> np.uint64(32)
    prose, code = routing.experts[sequence <= 5], routing.experts[sequence >= 9]

    def shares(experts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        uses = [np.bincount(experts[:, layer].ravel(), minlength=8) for layer in range(8)]
        return np.array(uses) / experts[:, 0].size

    assert np.abs(shares(prose) - shares(code)).sum(axis=1).mean() / 2 > 0.3
