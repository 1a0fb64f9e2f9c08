"""Caches that tokens can be taken out of, and those that can only be copied in time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from moerun.live.cropping import can_crop, copied
from moerun.live.kvcache import new_cache
from support.families import small_config
from transformers import AutoModelForCausalLM, DynamicCache

TEXT = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(3))
WHOLE = {
    "mixtral": True,
    "deepseek_v3": True,
    "deepseek_v32": True,  # whose indexer has keys of its own
    "qwen3_next": False,  # linear attention
    "granitemoehybrid": False,  # Mamba
    "mimo_v2_flash": False,  # past its window
    "deepseek_v4": False,  # compressed keys
}


@cache
def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(family), dtype=torch.float32).eval()


@torch.inference_mode()
def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits


def go_on(model: Any, cache: Any) -> torch.Tensor:
    return torch.cat([read(model, cache, ids) for ids in (TEXT[:, 20:23], TEXT[:, 23:])], 1)


def made(model: Any, ours: bool) -> Any:
    return new_cache(model, 24) if ours else DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_a_cropped_cache_is_that_of_the_text_before(family: str, ours: bool) -> None:
    model = model_of(family)
    long, short = made(model, ours), made(model, ours)
    read(model, long, TEXT[:, :12])
    read(model, long, TEXT[:, 12:20])
    read(model, short, TEXT[:, :12])
    assert can_crop(long, 0)
    assert can_crop(long, 8) == WHOLE[family]
    if WHOLE[family]:
        long.crop(-8)
        assert torch.equal(go_on(model, long), go_on(model, short))


@pytest.mark.parametrize("family", WHOLE)
def test_a_copy_goes_on_from_where_it_was_made(family: str) -> None:
    model = model_of(family)
    one, two = made(model, True), made(model, True)
    for each in (one, two):
        read(model, each, TEXT[:, :12])
    kept = copied(one)
    read(model, one, TEXT[:, 12:20])
    assert torch.equal(go_on(model, kept), go_on(model, two))


def test_a_window_that_is_not_full_has_all_tokens() -> None:
    model = model_of("mimo_v2_flash")
    for tokens, whole in ((5, True), (6, False)):
        cache = made(model, True)
        read(model, cache, TEXT[:, :2])
        read(model, cache, TEXT[:, 2:tokens])
        assert can_crop(cache, 3) == whole
        if whole:
            cache.crop(-3)
            fresh = made(model, True)
            read(model, fresh, TEXT[:, :2])
            assert torch.equal(go_on(model, cache), go_on(model, fresh))


def test_compressed_keys_are_not_cropped_in_a_window_that_is_not_full() -> None:
    model = model_of("deepseek_v4")
    cache = made(model, True)
    read(model, cache, TEXT[:, :5])
    assert all(layer.get_seq_length() < layer.sliding_window for layer in cache.layers)
    assert not can_crop(cache, 2)


def test_a_layer_that_nobody_has_tried_cannot_be_cropped() -> None:
    cache = made(model_of("mixtral"), False)
    unknown = type("Unknown", (type(cache.layers[0]),), {})
    cache.layers[0].__class__ = unknown
    assert cache.is_croppable
    assert not can_crop(cache, 1)
