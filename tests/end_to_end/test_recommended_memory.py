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
from moesim.recommend.budget import Budget, dense_bytes

CONTEXT = 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache", "workspace"),
    [
        ("mixtral-8x7b", 0.95, 0.95),
        ("qwen3-30b-a3b", 0.95, 0.9),
        ("olmoe-1b-7b", 0.9, 0.95),
        ("deepseek-v2-lite", 0.9, 0.7),  # its cache holds what keys and values are made from
        ("glm-4.7-flash", 0.9, 0.7),
        ("gpt-oss-20b", 1.7, 0.95),  # half of its layers look back 128 tokens; scores are held
    ],
)
def test_the_estimate_is_what_a_run_plans(name: str, cache: float, workspace: float) -> None:
    shape, found = find_shape(name), find_model(name)
    model = GeneratedModel(
        find_config(shape), name=name, precision="4bit", seed=0, attention="4bit"
    )
    needs = needs_of(
        GeneratedStore(model, held=False),
        torch.device("cuda"),
        context_tokens=CONTEXT,
        prompt_tokens=None,
        horizon=0,
        copies=1,
    )
    assert found is not None
    budget = Budget.of(10**12, CONTEXT, found)
    dense = dense_bytes(found, open_trace("tiny").meta, "4bit")
    assert dense == pytest.approx(needs.weights_bytes, rel=0.01)
    assert cache <= budget.kv_cache_bytes / needs.kv_cache_bytes <= cache + 0.1
    assert workspace <= budget.workspace_bytes / needs.workspace_bytes <= workspace + 0.1
