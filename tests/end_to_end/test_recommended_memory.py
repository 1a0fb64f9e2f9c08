"""The memory that `moesim recommend` counts with, beside what `moerun --plan` computes."""

from __future__ import annotations

import pytest
import torch
from moeroute import open_trace
from moeroute.models import find_model
from moerun.bench.generated import GeneratedModel, GeneratedStore
from moerun.bench.models import find_config
from moerun.bench.shapes import find_shape
from moerun.memory.needs import needs_of
from moerun.memory.plan import Needs
from moesim.recommend.budget import PREFETCH_HORIZON, Budget, cache_bytes, dense_bytes

CONTEXT = 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache", "whole", "in_chunks"),
    [
        ("mixtral-8x7b", 1.0, 1.0, 1.0),
        ("qwen3-30b-a3b", 1.0, 0.94, 0.98),
        ("qwen3.6-35b-a3b", 0.99, 0.9, 0.96),
        ("qwen3-next-80b-a3b", 0.99, 0.84, 0.91),
        ("olmoe-1b-7b", 1.0, 1.0, 1.0),
        ("deepseek-v2-lite", 1.0, 0.78, 1.02),  # its cache holds what keys and values are made from
        ("glm-4.7-flash", 1.0, 0.72, 0.73),
        ("gpt-oss-20b", 1.87, 1.01, 1.01),  # half of its layers look back 128 tokens
    ],
)
def test_the_estimate_is_what_a_run_plans(
    name: str, cache: float, whole: float, in_chunks: float
) -> None:
    shape, found = find_shape(name), find_model(name)
    model = GeneratedModel(
        find_config(shape), name=name, precision="4bit", seed=0, attention="4bit"
    )
    store = GeneratedStore(model, held=False)
    assert found is not None
    dense = dense_bytes(found, open_trace("tiny").meta, "4bit")
    budget = Budget(10**12, CONTEXT, found)
    for chunk, of_plan in ((None, whole), (512, in_chunks)):
        needs = _needs(store, "cuda", chunk)
        assert dense == pytest.approx(needs.weights_bytes, rel=0.01)
        assert cache_bytes(found, CONTEXT) / needs.kv_cache_bytes == pytest.approx(cache, abs=0.05)
        planned = budget.workspace_bytes(chunk) / needs.workspace_bytes
        assert planned == pytest.approx(of_plan, abs=0.05)


@pytest.mark.slow
def test_the_libraries_of_a_cpu_are_smaller() -> None:
    """Without a prompt to speak of, what is left of the workspace are libraries and logits."""
    name = "olmoe-1b-7b"
    found = find_model(name)
    model = GeneratedModel(find_config(find_shape(name)), name=name, precision="bf16", seed=0)
    needs = _needs(GeneratedStore(model, held=False), "cpu", 1)
    estimate = Budget(10**12, CONTEXT, found, "cpu").workspace_bytes(1)
    assert estimate == pytest.approx(needs.workspace_bytes, rel=0.2)


def _needs(store: GeneratedStore, device: str, chunk: int | None) -> Needs:
    return needs_of(
        store,
        torch.device(device),
        context_tokens=CONTEXT,
        prompt_tokens=chunk,
        horizon=PREFETCH_HORIZON,
        copies=1,
    )
