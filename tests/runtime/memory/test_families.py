"""What is planned for a family's cache and linear attention is never less than what it takes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.checkpoint.families import text_alone
from moerun.live.kvcache import new_cache
from moerun.memory.cache import ModelShape, held_bytes, shape_of
from moerun.memory.workspace import live_bytes
from support.families import FAMILIES, small_config, telling_fast
from transformers import AutoModelForCausalLM, DynamicCache

LINEAR = {
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
    "nemotron_h": "NemotronHMamba2Mixer",
    "kimi_linear": "KimiLinearDeltaAttention",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
}


@cache
def made(family: str) -> tuple[Any, ModelShape]:
    config = text_alone(small_config(family))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, shape_of(model.config, torch.float32)


@pytest.mark.parametrize("family", telling_fast(FAMILIES))
@settings(max_examples=4, deadline=None)
@given(
    passes=st.lists(st.sampled_from([1, 1, 2, 5, 6, 9, 33]), min_size=1, max_size=6),
    room=st.integers(0, 20),
)
def test_no_cache_is_larger_than_planned(family: str, passes: list[int], room: int) -> None:
    model, shape = made(family)
    context = sum(passes) + room
    held_cache = new_cache(model, context)
    planned = [layer.kept_bytes(context) for layer in shape.cache]
    for tokens in passes:
        with torch.inference_mode():
            model(torch.randint(3, 120, (1, tokens)), past_key_values=held_cache, use_cache=True)
        held = [held_bytes(layer) for layer in held_cache.layers]
        assert all(map(int.__le__, held, planned)), (tokens, held, planned)
    assert sum(held) <= shape.cache_bytes(context)


@pytest.mark.parametrize("family", telling_fast(LINEAR))
@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 700))
def test_linear_attention_takes_no_more_than_planned(family: str, tokens: int) -> None:
    model, shape = made(family)
    module = next(m for m in model.modules() if type(m).__name__ == LINEAR[family])
    ids = torch.randint(3, 120, (1, tokens))
    with torch.inference_mode():
        (peak,) = live_bytes([module], lambda: model(ids, past_key_values=new_cache(model, tokens)))
    assert 0 < peak <= shape.linear.n_bytes(tokens, tokens)
    assert shape.linear.n_bytes(tokens, tokens) < 2 * peak or tokens < 400


@pytest.mark.parametrize("family", ["mixtral", "gemma4", "glm4_moe_lite"])
def test_other_families_have_no_linear_attention(family: str) -> None:
    shape = made(family)[1]
    assert shape.linear.n_bytes(2048, 4096) == shape.indexing.n_bytes(2048, 4096) == 0


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 500))
def test_an_indexer_takes_no_more_than_planned(family: str, tokens: int) -> None:
    model, shape = made(family)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Indexer"))
    ids = torch.randint(3, 120, (1, tokens))
    with torch.inference_mode():
        (peak,) = live_bytes([module], lambda: model(ids, past_key_values=new_cache(model, tokens)))
    planned = shape.indexing.n_bytes(tokens, tokens)
    assert 0 < peak <= planned
    assert planned < 6 * peak or tokens < 300


def test_stock_caches_stay_stock() -> None:
    model, _ = made("deepseek_v4")
    ours = new_cache(model, 10)
    stock = DynamicCache(config=model.config)
    for one, other in zip(ours.layers, stock.layers, strict=True):
        assert type(one) is not type(other)
        assert type(other).__module__.startswith("transformers.")
