"""What is planned for a model's cache is what transformers' own cache takes of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moerun.errors import RunError
from moerun.memory.cache import held_bytes, shape_of
from support.moe_models import FAMILIES, random_model, small_config
from transformers import DynamicCache

TOKENS = 40
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
HYBRID: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "layer_types": LINEAR,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "mixtral with a window": ("mixtral", {"sliding_window": 9}),
    "gpt_oss past its window": (
        "gpt_oss",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9},
    ),
    "qwen3_next": ("qwen3_next", HYBRID),
}


def held_after(model: Any, tokens: int) -> list[int]:
    """Bytes of each layer of the stock cache after a prompt, of what it may use again."""
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.inference_mode():
        model(torch.arange(tokens)[None], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if layer.get_max_length() > 0:  # a window's states are part of the prompt's until then
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return [held_bytes(layer) for layer in cache.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_cache_is_planned_as_large_as_the_stock_one_is(name: str, dtype: torch.dtype) -> None:
    family, changes = MODELS[name]
    model: Any = random_model(family, **changes).to(dtype)
    shape = shape_of(model.config, dtype)
    for tokens in (3, TOKENS):
        held = held_after(model, tokens)
        for layer, n_bytes in zip(shape.cache, held, strict=True):
            more = 0 if layer.window is None or tokens < layer.window else layer.token_bytes
            assert layer.kept_bytes(tokens) == n_bytes + more


def test_recurrent_layers_keep_states_and_no_tokens() -> None:
    shape = shape_of(small_config("qwen3_next", **HYBRID), torch.bfloat16)
    convolution = (2 * 2 * 8 + 4 * 24) * 4 * 2  # queries, keys, values; a kernel of 4; bfloat16
    recurrent = 4 * 8 * 24 * 4  # in float32 whatever the model's dtype
    for kind, layer in zip(LINEAR, shape.cache, strict=True):
        if kind == "linear_attention":
            assert (layer.token_bytes, layer.state_bytes) == (0, convolution + recurrent)
            assert layer.kept_bytes(10) == layer.kept_bytes(100_000)
        else:
            assert (layer.token_bytes, layer.state_bytes) == (2 * 2 * 16 * 2, 0)
    long = shape.cache_bytes(100_000)
    assert long < 0.51 * 5 * 2 * 2 * 16 * 2 * 100_000  # of four full layers and one growing


@pytest.mark.parametrize(
    ("name", "widest"),
    [("mixtral", 0), ("qwen2_moe", 64), ("deepseek_v3", 96), ("gpt_oss", 0)],
)
def test_the_widest_dense_matrix_is_found_in_the_model(name: str, widest: int) -> None:
    family, changes = MODELS[name]
    shape = shape_of(small_config(family, **changes), torch.bfloat16)
    assert shape.widest == widest
    assert shape.holds_scores == (family == "gpt_oss")


def test_a_configuration_whose_model_makes_no_pass_is_refused_in_one_line() -> None:
    config = small_config("mixtral", num_experts_per_tok=9, num_local_experts=8)
    with pytest.raises(RunError, match=r"the mixtral model that config.json describes cannot run"):
        shape_of(config, torch.float32)
