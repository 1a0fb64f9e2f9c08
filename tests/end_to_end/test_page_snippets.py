"""The fenced Python of the pages, run with what a reader would have there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moetrace
import numpy as np
import pytest
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from support.pages import blocks, pages
from support.recorders import sglang_answer

FOUND = {
    block.lines[0]: "\n".join(block.lines)
    for text in pages().values()
    for block in blocks(text)
    if block.language == "python"
}


def a_model() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("It was a bright cold day", return_tensors="pt")
    return {"model": AutoModelForCausalLM.from_pretrained(folder), "inputs": inputs}


class Vllm:
    """vLLM's engine, as far as the page uses it: two tokens of prompt, two generated."""

    def __init__(self, model: str, *, enable_return_routed_experts: bool) -> None:
        assert enable_return_routed_experts

    def generate(self, prompts: list[str]) -> list[Any]:
        experts = np.random.default_rng(0).random((3, 2, 5)).argsort(-1)[..., :2]
        answer = SimpleNamespace(token_ids=[8, 9], routed_experts=experts.astype(np.int16))
        return [SimpleNamespace(prompt_token_ids=[5, 6], outputs=[answer]) for _ in prompts]


class Sglang:
    """SGLang's engine, as far as the page uses it."""

    def generate(self, prompts: list[str], *, return_routed_experts: bool) -> list[Any]:
        assert return_routed_experts
        return [sglang_answer() for _ in prompts]


def is_a_trace() -> None:
    open_trace("t.parquet").validate()


def is_an_answer() -> None:
    (answer,) = json.loads(Path("answers.json").read_text())
    assert "routed_experts" in answer["meta_info"]


# By the first line: what the reader has, and what must be there afterwards.
SNIPPETS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], None]]] = {
    "import moetrace": (a_model, is_a_trace),
    "llm = LLM(model, enable_return_routed_experts=True)": (
        lambda: {"LLM": Vllm, "model": "m", "prompts": ["a"], "moetrace": moetrace},
        is_a_trace,
    ),
    "answers = engine.generate(prompts, return_routed_experts=True)": (
        lambda: {"engine": Sglang(), "prompts": ["a"], "json": json},
        is_an_answer,
    ),
}


def test_every_snippet_is_run() -> None:
    assert set(FOUND) == set(SNIPPETS)


@pytest.mark.parametrize("first", SNIPPETS)
def test_a_snippet_of_a_page(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given, holds = SNIPPETS[first]
    exec(compile(FOUND[first], first, "exec"), given())
    holds()
