"""The cache that generations write to: stock results, without copying all there is for a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.kvcache import STEP_TOKENS, GrowingLayer, WindowLayer, new_cache
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.memory.cache import held_bytes, shape_of
from moerun.offload.load import own_tokens
from moerun.settings import Settings
from moerun.store.pack import pack
from support.moe_models import FAMILIES, random_model
from support.runs import generate
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "mixtral with a window": ("mixtral", {"sliding_window": 6}),
    "gpt-oss past its window": ("gpt_oss", SLIDING),
}


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 4)


def test_states_are_those_of_the_stock_layer() -> None:
    ours, stock = GrowingLayer(1000), DynamicLayer()
    for tokens in (5, 1, STEP_TOKENS - 3, 1, 1, 2 * STEP_TOKENS, 1):
        both = states(tokens)
        for found, wanted in zip(ours.update(*both), stock.update(*both), strict=True):
            assert torch.equal(found, wanted)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    for layer in (ours, stock):
        layer.crop(-4)
    both = states(1)
    assert all(map(torch.equal, ours.update(*both), stock.update(*both)))
    for layer in (ours, stock):
        layer.reset()
    assert all(map(torch.equal, ours.update(*both), stock.update(*both)))


def test_states_that_others_replaced_are_not_forgotten() -> None:
    ours, stock = GrowingLayer(1000), DynamicLayer()
    for change in (None, lambda layer: layer.reorder_cache(torch.tensor([1, 0])), None):
        if change is not None:
            change(ours), change(stock)
        both = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 4)
        assert all(map(torch.equal, ours.update(*both), stock.update(*both)))
    for layer in (ours, stock):
        layer.batch_repeat_interleave(2)
    both = torch.randn(4, 2, 1, 8), torch.randn(4, 2, 1, 4)
    assert all(map(torch.equal, ours.update(*both), stock.update(*both)))


@pytest.mark.parametrize("prompt", [3, 6, 40])
def test_a_window_keeps_the_states_of_the_stock_layer_in_less_memory(prompt: int) -> None:
    ours, stock = WindowLayer(6), DynamicSlidingWindowLayer(6)
    for tokens in (prompt, 1, 1, 4, 1):
        both = states(tokens)
        assert all(map(torch.equal, ours.update(*both), stock.update(*both)))
        assert torch.equal(ours.keys, stock.keys)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1)
        assert ours.keys.untyped_storage().nbytes() <= 2 * ours.keys.nbytes


def test_a_token_is_written_behind_the_others_until_the_room_is_full() -> None:
    layer = GrowingLayer(10 + STEP_TOKENS + 5)
    keys, _ = layer.update(*states(10))
    places = []
    for _ in range(STEP_TOKENS + 5):
        keys, values = layer.update(*states(1))
        places.append(keys.data_ptr())
        assert (keys.shape[-1], values.shape[-1]) == (8, 4)
    assert len(set(places)) == 2
    assert keys.untyped_storage().nbytes() == layer.limit_tokens * 2 * 8 * 4
    layer.update(*states(1))  # a limit said too low costs memory, not the text


@pytest.mark.parametrize("name", sorted(MODELS))
def test_generations_have_the_logits_of_the_stock_cache(name: str) -> None:
    family, changes = MODELS[name]
    model: Any = random_model(family, **changes)
    prompt = torch.arange(1, 11)[None]
    how = GenerationConfig(
        max_new_tokens=20, eos_token_id=-1, output_logits=True, return_dict_in_generate=True
    )
    stock = model.generate(prompt, generation_config=how)
    ours = model.generate(prompt, generation_config=how, past_key_values=new_cache(model, 30))
    assert ours.sequences.shape[1] == 30
    assert all(map(torch.equal, ours.logits, stock.logits))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_more_is_held_than_was_planned(name: str) -> None:
    family, changes = MODELS[name]
    model: Any = random_model(family, **changes)
    shape = shape_of(model.config, torch.float32)
    cache = new_cache(model, 40)
    model(torch.arange(30)[None], past_key_values=cache)
    kept = sum(layer.kept_bytes(40) for layer in shape.cache)
    assert sum(map(held_bytes, cache.layers)) <= kept  # a window is not all of the prompt
    for token in range(10):
        model(torch.tensor([[token]]), past_key_values=cache)
    held = [held_bytes(layer) for layer in cache.layers]
    # Growing, a layer's keys are there twice for a moment, or its values.
    assert sum(held) + max(held) / 2 <= shape.cache_bytes(40)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}])
def test_grouped_heads_are_attended_to_together_in_bfloat16(changes: dict[str, Any]) -> None:
    model: Any = random_model("mixtral", **changes).to(torch.bfloat16)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attending(query: torch.Tensor, key: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        seen.append((tuple(query.shape[1:3]), how.get("enable_gqa", False)))
        return attend(query, key, *rest, **how)

    prompt, token = torch.arange(1, 11)[None], torch.tensor([[5]])
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attending)
        caches = {"stock": DynamicCache(config=model.config), "ours": new_cache(model, 20)}
        for name, cache in caches.items():
            model.generate(prompt, past_key_values=cache, max_new_tokens=1, eos_token_id=-1)
            seen.clear()
            inputs = model.prepare_inputs_for_generation(
                token, past_key_values=cache, attention_mask=torch.ones(1, 11), use_cache=True
            )
            found[name] = model(**inputs).logits
    assert set(seen) == {((2, 2), False)}  # ours: two heads of keys, two queries on each
    close = (found["ours"] - found["stock"]).norm() / found["stock"].norm()
    assert close < 0.05
    assert not new_cache(random_model("mixtral", **changes), 20).is_compileable
    alone: Any = random_model("mixtral", num_key_value_heads=4).to(torch.bfloat16)
    assert not new_cache(alone, 20).is_compileable


def test_nothing_is_compiled_whatever_the_cache() -> None:
    model: Any = random_model("mixtral")
    config = Sampling().config(model, 5)
    config.compile_config = CompileConfig()
    config.compile_config._compile_all_devices = True
    kwargs = {"past_key_values": StaticCache(config=model.config, max_cache_len=20)}
    assert not model._valid_auto_compile_criteria(kwargs, config)
    config.disable_compile = None
    assert model._valid_auto_compile_criteria(kwargs, config)


def test_what_a_checkpoint_prefers_does_not_change_the_text(tmp_path: Path) -> None:
    texts, prompt = [], "It was the best of times, it was the worst of times"
    store = pack(resolve("tiny"), tmp_path / "store")
    for preferred in ({}, {"repetition_penalty": 9.0, "cache_implementation": "static"}):
        path = store.path / "generation_config.json"
        own = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(own | preferred))
        with Runner(store, Settings(find_policy("lru"))) as runner:
            texts.append(generate(runner, prompt, Sampling(max_new_tokens=12, stop=False)))
    shutil.rmtree(store.path)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("ids", [[None], "2", 1.5, [1, [2]], -1, True, {}])
def test_a_special_token_that_is_none_is_refused_by_name(tmp_path: Path, ids: object) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(RunError, match=r"generation_config\.json: eos_token_id is .*, not the id"):
        own_tokens(tmp_path, config=None)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000])
def test_special_tokens_of_a_file_that_is_no_object_are_refused_by_name(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(RunError, match=r"generation_config\.json cannot be used: "):
        own_tokens(tmp_path, config=None)


@pytest.mark.parametrize("ids", [2, [2, 7], None])
def test_special_tokens_are_the_checkpoint_s(tmp_path: Path, ids: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert own_tokens(tmp_path, config=None).eos_token_id == ids
