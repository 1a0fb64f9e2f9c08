"""Decoding through compiled layers: which models take them, and that they compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.live import token_layers
from moerun.live.kvcache import new_cache
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.token_layers import TokenHead, TokenLayer, TokenPass
from moerun.settings import Settings
from moerun.store.pack import pack
from support.moe_models import random_model

IDS = torch.randint(1, 128, (1, 18), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 32},
    "qwen3_moe": {
        **{"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3},
        **{"moe_intermediate_size": 32, "norm_topk_prob": True},
    },
    "qwen2_moe": {"hidden_size": 128},  # biases, and heads of 32
}
PASSES = {"mixtral", "qwen3_moe"}


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Runner]]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[Any, Runner] = {}

    def get(family: str, attention: str) -> Runner:
        if (family, attention) not in made:
            source = folder / family
            if not source.exists():
                model = random_model(family, num_hidden_layers=2, **SIZES[family])
                model.to(torch.bfloat16).save_pretrained(source)
            store = pack(
                source, folder / f"{family}-{attention}", precision="q8_0", attention=attention
            )
            settings = Settings(policy=find_policy("lru"), slots=store.n_experts)
            made[family, attention] = Runner(store, settings)
        return made[family, attention]

    yield get
    for runner in made.values():
        runner.close()


@contextmanager
def stock_code(model: Any) -> Iterator[None]:
    taken = {m: vars(m).pop("forward") for m in model.modules() if "forward" in vars(m)}
    try:
        yield
    finally:
        for module, forward in taken.items():
            module.forward = forward


def installed(model: Any, kind: type) -> int:
    return sum(isinstance(vars(m).get("forward"), kind) for m in model.modules())


@torch.inference_mode()
def logits_of(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of each of ``tokens`` [1, T], in a pass of its own."""
    found = [
        model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        for t in range(tokens.shape[1])
    ]
    return torch.cat(found, dim=1)[0].float()


@pytest.mark.parametrize("family", SIZES)
def test_a_token_is_computed_as_by_the_stock_layers(
    family: str, runner_of: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner_of(family, "q8_0").model
    assert installed(model, TokenLayer) == 2
    assert installed(model, TokenHead) == 1
    assert installed(model, TokenPass) == (family in PASSES)
    with torch.inference_mode():
        cache = new_cache(model, 32)
        prompt = model(input_ids=IDS[:, :10], past_key_values=cache, use_cache=True).logits
    before = copy.deepcopy(cache)
    with stock_code(model):
        wanted = logits_of(model, cache, IDS[:, 10:])
        cache_of_stock = new_cache(model, 32)
        with torch.inference_mode():
            of_stock = model(
                input_ids=IDS[:, :10], past_key_values=cache_of_stock, use_cache=True
            ).logits
    assert torch.equal(prompt, of_stock)  # a prompt takes the stock code
    attended: list[int] = []
    attend = TokenLayer.attend

    def watched(layer: TokenLayer, *arguments: Any) -> Any:
        attended.append(1)
        return attend(layer, *arguments)

    monkeypatch.setattr(TokenLayer, "attend", watched)
    found = logits_of(model, before, IDS[:, 10:])
    assert len(attended) == 2 * found.shape[0]
    assert before.get_seq_length() == IDS.shape[1]
    # Of bfloat16 and of activations of 8 bits. A median, for a gate that was close to its next
    # choice may take it.
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.median() < 0.02
    for mine, stocks in zip(before.layers, cache.layers, strict=True):
        assert (mine.keys - stocks.keys).norm() < 0.05 * stocks.keys.norm()


def test_what_is_hidden_stays_hidden(runner_of: Callable[..., Runner]) -> None:
    model = runner_of("qwen3_moe", "q8_0").model
    told = []
    for first in (5, 77):  # of which the mask hides the first
        ids = torch.cat([torch.tensor([[first]]), IDS[:, :9]], dim=1)
        mask = torch.ones(1, 11, dtype=torch.int64)
        mask[:, 0] = 0
        cache = new_cache(model, 32)
        named = {"past_key_values": cache, "use_cache": True}
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask[:, :10], **named)
            told.append(model(input_ids=IDS[:, 9:10], attention_mask=mask, **named).logits)
    assert torch.equal(*told)


@pytest.mark.parametrize("attention", ["native", "4bit"])
def test_attention_in_no_blocks_is_computed_by_the_stock_code(
    attention: str, runner_of: Callable[..., Runner]
) -> None:
    runner = runner_of("mixtral", attention)
    assert not any("forward" in vars(module) for module in runner.model.modules())
    sampling = Sampling(max_new_tokens=6, stop=False)
    done = runner.generation().run(IDS, sampling)
    with torch.inference_mode():
        stock = runner.model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert done.token_ids == stock[0, IDS.shape[1] :].tolist()


def test_code_that_is_not_known_is_left_alone(
    runner_of: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner_of("mixtral", "q8_0").model
    monkeypatch.setattr(token_layers, "_LAYERS", set())
    with stock_code(model):
        token_layers.install_token_layers(model)
        assert installed(model, TokenLayer) == installed(model, TokenPass) == 0
        assert installed(model, TokenHead) == 1
        for module in model.modules():
            vars(module).pop("forward", None)
