"""A script's own model is recorded as it runs: batches, filling, ends of text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moesim
import moetrace
import numpy as np
import pytest
import torch
from moeroute import Trace, TraceError, open_trace
from moerun.errors import RunError
from moetrace.model import Checkpoint

L, K, E = 8, 2, 8  # of the bundled model


def by_token(trace: Trace, name: str) -> Any:
    column = trace.array(name)
    return column.reshape(-1, L, *column.shape[1:])


def stock_experts(tiny: Checkpoint, ids: list[int]) -> Any:
    """What the stock model's gates choose for a text alone: [tokens, L, K]."""
    with torch.no_grad():
        found = tiny.model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(K).indices for layer in found], dim=1).numpy()


def prompts(tiny: Checkpoint) -> list[list[int]]:
    return [tiny.tokenizer(text)["input_ids"] for text in ("It was a bright day", "def add(a")]


def test_one_sequence_is_recorded_as_it_was_generated(tiny: Checkpoint, tmp_path: Path) -> None:
    prompt = prompts(tiny)[0]
    with moetrace.recording(tiny.model, tmp_path / "t.parquet", name="mine"):
        out = tiny.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    trace = open_trace(tmp_path / "t.parquet")
    trace.validate()
    tokens = out[0].tolist()[: trace.n_rows // L]  # the last one is chosen and not fed
    assert by_token(trace, "token_id")[:, 0].tolist() == tokens
    assert by_token(trace, "phase")[:, 0].tolist() == [0] * len(prompt) + [1] * (
        len(tokens) - len(prompt)
    )
    np.testing.assert_array_equal(by_token(trace, "experts"), stock_experts(tiny, tokens))
    assert (trace.meta.model, trace.meta.weight_rule) == ("mine", "softmax-topk-renorm")
    assert trace.meta.horizon == 3


def test_a_batch_with_filling_is_one_pass_for_all(tiny: Checkpoint, tmp_path: Path) -> None:
    texts = prompts(tiny)
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    with moetrace.recording(tiny.model, tmp_path / "t.parquet", horizon=0):
        tiny.model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        tiny.model(torch.tensor([texts[0][:3]]))
    trace = open_trace(tmp_path / "t.parquet")
    trace.validate()
    sequence, of_pass = by_token(trace, "sequence")[:, 0], by_token(trace, "pass_id")[:, 0]
    for number, text in enumerate(texts):
        mine = sequence == number
        assert mine.sum() == len(text) + 3
        assert by_token(trace, "token_id")[mine, 0].tolist()[: len(text)] == text
        assert of_pass[mine].tolist() == [0] * len(text) + [1, 2, 3]
    assert of_pass[sequence == 2].tolist() == [4] * 3
    workload = moesim.load_workload(trace)
    assert workload.tokens.tolist() == [sum(map(len, texts))] * L + [2] * (3 * L) + [3] * L
    assert int(workload.routed.sum()) == trace.n_rows * K


def test_tokens_after_the_end_of_a_text_are_filling(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prompts(tiny)[0][:4], prompts(tiny)[1][:4]]
    ids = torch.tensor(texts)
    plain = tiny.model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    end = int(plain[0, 4])  # the first row's first answer
    assert end not in plain[1, 4:].tolist()
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", end)
    monkeypatch.setattr(tiny.model.generation_config, "pad_token_id", 0)
    with moetrace.recording(tiny.model, tmp_path / "t.parquet", horizon=0):
        tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    trace = open_trace(tmp_path / "t.parquet")
    trace.validate()
    sequence = by_token(trace, "sequence")[:, 0]
    assert by_token(trace, "token_id")[sequence == 0, 0].tolist() == [*texts[0], end]
    assert (sequence == 1).sum() == 4 + 5


def test_nothing_is_left_where_nothing_ran_or_the_script_fails(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "t.parquet"

    def script(*texts: list[int]) -> None:
        with moetrace.recording(tiny.model, out):
            for text in texts:
                tiny.model(torch.tensor([text]))
                assert text, "the script fails"

    with pytest.raises(TraceError, match="no forward pass of the model ran"):
        script()
    with pytest.raises((AssertionError, RuntimeError)):
        script([1, 2], [3, 4], [])
    with pytest.raises(TraceError, match=r"the folder .* does not exist"):
        moetrace.recording(tiny.model, tmp_path / "no" / "t.parquet")
    with pytest.raises(RunError, match="is no mixture of experts"):
        moetrace.recording(torch.nn.Linear(2, 2), out)
    assert list(tmp_path.iterdir()) == []
    assert not tiny.model.base_model._forward_hooks


def vllm_output(prompt: list[int], answers: list[list[int]], experts: Any, split: bool) -> Any:
    """An output of vLLM's LLM.generate: the last token of an answer has no routing."""
    n = len(prompt)
    completions = []
    for i, answer in enumerate(answers):
        own = experts[: n + len(answer) - 1] if not split else experts[n : n + len(answer) - 1]
        completions.append(SimpleNamespace(token_ids=answer, routed_experts=own, index=i))
    output = SimpleNamespace(prompt_token_ids=prompt, outputs=completions)
    if split:
        output.prompt_routed_experts = experts[:n]
    return output


@pytest.mark.parametrize("split", [False, True])
def test_what_vllm_returns_becomes_a_trace(tmp_path: Path, split: bool) -> None:
    rng = np.random.default_rng(0)
    experts = rng.random((7, 3, 5)).argsort(-1)[..., :2].astype(np.int16)
    outputs = [vllm_output([5, 6, 7], [[8, 9, 1]], experts, split)]
    outputs.append(vllm_output([5, 6], [[8, 9], [4, 3, 2]], experts, split))
    trace = moetrace.write_requests(
        tmp_path / "t.parquet", moetrace.vllm_requests(outputs), model="m", n_experts=5
    )
    trace.validate()
    assert trace.array("experts")[: 5 * 3].reshape(5, 3, 2).tolist() == experts[:5].tolist()
    assert trace.array("token_id")[::3].tolist()[:8] == [5, 6, 7, 8, 9, 5, 6, 8]
    assert trace.array("phase")[::3].tolist()[:8] == [0, 0, 0, 1, 1, 0, 0, 1]
    second = trace.array("sequence")[::3].tolist().count(2)
    assert second == (2 if split else 4)


def test_requests_that_are_wrong_are_named(tmp_path: Path) -> None:
    good = moetrace.RoutedRequest(np.zeros((2, 3, 1), int))
    for bad, message in (
        (moetrace.RoutedRequest(np.zeros((2, 3))), r"request 1: experts is float64\[2, 3\]"),
        (moetrace.RoutedRequest(np.zeros((2, 3, 1), int), 1, [5]), "request 1: 1 token ids for 2"),
        (moetrace.RoutedRequest(np.full((2, 3, 1), 9)), "request 1, column experts: expert 9"),
    ):
        with pytest.raises(TraceError, match=message):
            moetrace.write_requests(tmp_path / "t.parquet", [good, bad], model="m", n_experts=4)
    empty = SimpleNamespace(token_ids=[1], routed_experts=None)
    output = SimpleNamespace(prompt_token_ids=[1], outputs=[empty])
    with pytest.raises(TraceError, match="output 0: no routed_experts: make the LLM with"):
        list(moetrace.vllm_requests([output]))
    assert list(tmp_path.iterdir()) == []
