"""A recording says, row by row, what the stock model did with the text."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moeroute import Trace, open_trace
from moeroute.models import BLOCKS, PACKED
from moerun.errors import RunError
from moerun.offload.gate_predictor import OWN_NORM
from moetrace.corpus import Windows
from moetrace.model import Checkpoint
from moetrace.record import Settings, open_windows, record

SETTINGS = Settings(sequence_length=32, batch_tokens=128)


def record_corpus(
    tiny: Checkpoint, corpus: Path, out: Path, settings: Settings = SETTINGS
) -> tuple[Trace, Windows]:
    windows = open_windows(tiny, [corpus], settings)
    record(tiny, windows, settings, out)
    return open_trace(out), windows


def by_token(trace: Trace, name: str) -> Any:
    """A column as [tokens, layers, ...]."""
    column = trace.array(name)
    return column.reshape(-1, trace.meta.n_layers, *column.shape[1:])


def test_rows_are_the_models_own_routing(tiny: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    trace, windows = record_corpus(tiny, corpus, tmp_path / "t.parquet")
    trace.validate()
    assert by_token(trace, "token_id")[:, 0].tolist() == [
        token for sequence in windows.sequences for token in sequence
    ]
    logits, experts = by_token(trace, "router_logits"), by_token(trace, "experts")
    weights, start = by_token(trace, "weights"), 0
    for number, sequence in enumerate(windows.sequences):
        rows = slice(start, start + len(sequence))
        start += len(sequence)
        assert set(by_token(trace, "sequence")[rows].ravel()) == {number}
        assert by_token(trace, "position")[rows, 0].tolist() == list(range(len(sequence)))
        with torch.no_grad():
            stock = tiny.model(torch.tensor([sequence]), output_router_logits=True)
        for layer, expected in enumerate(stock.router_logits):
            np.testing.assert_allclose(logits[rows, layer], expected.numpy(), rtol=2e-3, atol=2e-3)
            top = expected.softmax(-1).topk(2)
            np.testing.assert_array_equal(experts[rows, layer], top.indices.numpy())
            share = top.values / top.values.sum(-1, keepdim=True)
            np.testing.assert_allclose(weights[rows, layer], share.numpy(), atol=1e-4)


def test_the_metadata_is_complete(tiny: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    trace, windows = record_corpus(tiny, corpus, tmp_path / "t.parquet")
    meta = trace.meta
    assert (meta.source, meta.model, meta.n_layers, meta.n_experts, meta.top_k) == (
        "recorded",
        "tiny",
        8,
        8,
        2,
    )
    expert_values = 3 * 128 * 256
    assert meta.precision == "fp16"
    assert meta.expert_bytes["fp16"] == 2 * expert_values
    assert set(meta.expert_bytes) == {"fp16", "fp32", "bf16", *PACKED, *BLOCKS}
    attention, norms, gate = 128 * 128 * 2 + 128 * 64 * 2, 2 * 128, 8 * 128
    assert meta.layer_bytes == 2 * (attention + norms + gate)
    vocabulary = tiny.model.config.vocab_size
    assert meta.token_bytes == 2 * (128 + 128 + 128 * vocabulary)
    assert (meta.prediction, meta.horizon) == (OWN_NORM, 3)
    assert (meta.weight_rule, meta.weight_scale) == ("softmax-topk-renorm", 1.0)
    assert meta.corpus_digest == windows.digest
    assert meta.revision is not None
    assert meta.revision.startswith("sha256:")
    assert {"torch", "transformers", "moe-offload-lab"} <= meta.packages.keys()


def test_prompt_tokens_are_marked(tiny: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, prompt_tokens=10, horizon=0)
    trace, _ = record_corpus(tiny, corpus, tmp_path / "t.parquet", settings)
    np.testing.assert_array_equal(trace.array("phase"), trace.array("position") >= 10)
    assert trace.meta.horizon == 0
    assert trace.meta.prediction is None


def test_greedy_generation_is_the_models_own(
    tiny: Checkpoint, corpus: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, generate=6, prompt_tokens=12, max_tokens=30)
    trace, windows = record_corpus(tiny, corpus, tmp_path / "t.parquet", settings)
    assert [len(prompt) for prompt in windows.sequences] == [12, 12, 6]
    for number, prompt in enumerate(windows.sequences):
        mine = by_token(trace, "sequence")[:, 0] == number
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = tiny.model.generate(ids, max_new_tokens=6, do_sample=False)[0]
            stock = tiny.model(out[None, :-1], output_router_logits=True).router_logits
        assert by_token(trace, "token_id")[mine, 0].tolist() == out[:-1].tolist()
        phase = by_token(trace, "phase")[mine, 0]
        assert phase.tolist() == [0] * len(prompt) + [1] * (len(out) - 1 - len(prompt))
        for layer, expected in enumerate(stock):
            found = by_token(trace, "router_logits")[mine, layer]
            np.testing.assert_allclose(found, expected.numpy(), rtol=5e-3, atol=5e-3)


def test_the_tokenizers_end_ends_a_generation_that_the_configuration_does_not(
    tiny: Checkpoint, corpus: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, generate=12, prompt_tokens=12, max_tokens=12)
    windows = open_windows(tiny, [corpus], settings)
    with torch.no_grad():
        out = tiny.model.generate(
            torch.tensor(windows.sequences[:1]), max_new_tokens=12, do_sample=False
        )[0].tolist()
    end = next(i for i in range(14, len(out) - 1) if out[i] not in out[12:i])
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(out[end])
    record(replace(tiny, tokenizer=tokenizer), windows, settings, tmp_path / "t.parquet")
    trace = open_trace(tmp_path / "t.parquet")
    # The last token is chosen but not passed through.
    assert by_token(trace, "token_id")[:, 0].tolist() == out[:end]


def test_sampling_follows_the_seed(tiny: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    def tokens(name: str, seed: int) -> list[int]:
        settings = replace(
            SETTINGS, generate=8, prompt_tokens=4, max_tokens=8, temperature=1.5, seed=seed
        )
        trace, _ = record_corpus(tiny, corpus, tmp_path / name, settings)
        assert trace.meta.seed == seed
        return list(by_token(trace, "token_id")[:, 0])

    first = tokens("a.parquet", 1)
    assert tokens("b.parquet", 1) == first
    assert tokens("c.parquet", 2) != first


@pytest.mark.parametrize("generate", [0, 4])
def test_an_interrupted_recording_goes_on(
    tiny: Checkpoint, corpus: Path, tmp_path: Path, generate: int
) -> None:
    settings = replace(
        SETTINGS, generate=generate, temperature=1.0 if generate else 0.0, max_tokens=200
    )
    whole, windows = record_corpus(tiny, corpus, tmp_path / "whole.parquet", settings)
    out, told = tmp_path / "cut.parquet", []

    def stop(tokens: int, earlier: bool) -> None:
        told.append((tokens, earlier))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tiny, windows, settings, out, on_tokens=stop)
    assert not out.exists()
    resumed: list[tuple[int, bool]] = []
    record(tiny, windows, settings, out, resume=True, on_tokens=lambda *done: resumed.append(done))
    assert resumed[0] == (sum(tokens for tokens, _ in told), True)
    assert sum(tokens for tokens, _ in resumed) * 8 == whole.n_rows
    again = open_trace(out)
    for name in whole.columns:
        np.testing.assert_array_equal(again.array(name), whole.array(name), err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 513}, "sequence length 513: the model was made for 512"),
        ({"generate": 4, "prompt_tokens": 0}, "prompt tokens 0: there is nothing"),
        ({"generate": 32}, "generate 32: leaves no room for a prompt in a sequence of 32"),
    ],
)
def test_sequences_must_fit(
    tiny: Checkpoint, corpus: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        open_windows(tiny, [corpus], replace(SETTINGS, **change))
