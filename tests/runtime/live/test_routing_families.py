"""Routing by a policy in every family: the stock model's logits where the policy changes nothing,
those of a stock model whose gates choose the same where it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from moepolicy import PolicyError, find_policy
from moeroute.families import FAMILIES as TABLE
from moerun.checkpoint.families import find_experts
from moerun.live.runner import Runner
from moerun.offload.gate_predictor import find_routers
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.families import LIKE_OTHERS, save_small, telling_fast

OWN = Path(__file__).parents[2] / "support" / "routing.py"
RULES = {
    "deepseek_v2": ("softmax", 1.0),
    "deepseek_v3": ("sigmoid-renorm-scale", 2.5),
    "dots1": ("sigmoid", 1.0),
    "ernie4_5_moe": ("softmax-topk-renorm", 1.0),
    "glm4_moe": ("sigmoid-renorm-scale", 1.0),
    "gpt_oss": ("softmax-topk-renorm", 1.0),
    "granitemoe": ("softmax-topk-renorm", 1.0),
    "hunyuan_v1_moe": ("softmax-topk-renorm", 1.0),
    "minimax_m2": ("sigmoid-renorm-scale", 1.0),
    "mixtral": ("softmax-topk-renorm", 1.0),
    "olmoe": ("softmax", 1.0),
    "qwen2_moe": ("softmax", 1.0),
    "qwen3_moe": ("softmax-topk-renorm", 1.0),
    "qwen3_next": ("softmax-topk-renorm", 1.0),
    "glm4_moe_lite": ("sigmoid-renorm-scale", 1.8),
    "deepseek_v32": ("sigmoid-renorm-scale", 2.5),
    "granitemoehybrid": ("softmax-topk-renorm", 1.0),
    "hy_v3": ("sigmoid-renorm-scale", 2.826),
    "kimi_linear": ("sigmoid-renorm-scale", 2.446),
    "glm_moe_dsa": ("sigmoid-renorm-scale", 2.5),
    "mimo_v2_flash": ("sigmoid-renorm-scale", 1.0),
    "cohere2_moe": ("softmax-topk-renorm", 1.0),
    "afmoe": ("sigmoid-renorm-scale", 1.0),
    "solar_open": ("sigmoid-renorm-scale", 1.0),
    "exaone_moe": ("sigmoid-renorm-scale", 2.5),
    "flex_olmo": ("softmax", 1.0),
    "qwen3_5_moe": ("softmax-topk-renorm", 1.0),
    "nemotron_h": ("sigmoid-renorm-scale", 1.0),
    "llama4": ("sigmoid", 1.0),
    "deepseek_v4": ("sqrtsoftplus-renorm-scale", 1.5),
}
REFUSED = ("gemma4", "phimoe")
# Stock's own experts can be given other choices from outside, but for Llama 4's, which get none.
NEWER = (*LIKE_OTHERS, "qwen3_5_moe", "kimi_linear", "nemotron_h")
PATCHED = [family for family in RULES if family != "llama4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By family and precision: a checkpoint whose gates are decided, and its store."""
    folder, stores = tmp_path_factory.mktemp("families"), {}

    def get(family: str, precision: str) -> tuple[Path, ExpertStore]:
        source = folder / family
        if not source.exists():
            save_small(family, source, decided=True)
        if (family, precision) not in stores:
            stores[family, precision] = pack(
                source, folder / f"{family}-{precision}", precision=precision
            )
        return source, stores[family, precision]

    return get


@torch.no_grad()
def logits_of(model: Any, steps: int = 3) -> torch.Tensor:
    """Of prompts of one and of two sequences, and then of single tokens after each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for shape in ((1, 20), (2, 5)):
        ids = torch.randint(3, 120, shape, generator=generator)
        out = model(ids, use_cache=True)
        found.append(out.logits.flatten())
        for step in range(steps):
            past = out.past_key_values
            out = model(ids[:, step : step + 1], past_key_values=past, use_cache=True)
            found.append(out.logits.flatten())
    return torch.cat(found)


def stock_model(source: Path, dtype: torch.dtype) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


@contextmanager
def patched_gates(model: Any, rule: str, scale: float, *, half: bool) -> Iterator[None]:
    """The stock model with the experts of `support.routing.Second` and weights by ``rule``, worked
    out from the gates' logits alone; ``half``: as float16 has them."""
    hooks, seen = [], {}

    def tell(layer: int) -> Any:
        def hook(_module: Any, _given: Any, output: Any) -> None:
            logits = output[0].detach()
            seen[layer] = (logits.to(torch.float16) if half else logits).double().tolist()

        return hook

    def patch(layer: int) -> Any:
        def hook(_module: Any, given: Any) -> Any:
            hidden, ids, weights = given
            ids, weights = ids.clone(), weights.clone()
            for row, logits in enumerate(seen[layer]):
                chosen = ids[row].tolist()
                others = [e for e in range(len(logits)) if e not in chosen]
                best = max(others, key=lambda e: (logits[e], -e))
                if best % 2 and row % 3 != 1:
                    continue
                lightest = min(range(len(chosen)), key=lambda i: (weights[row, i], -i))
                chosen[lightest] = best
                ids[row] = torch.tensor(chosen)
                new = torch.tensor(weighed(rule, scale, logits, chosen), dtype=torch.float32)
                weights[row] = new.to(weights.dtype)
            return hidden, ids, weights

        return hook

    for layer, router in enumerate(find_routers(model)):
        hooks.append(router.register_forward_hook(tell(layer)))
    for layer, (_, module) in enumerate(find_experts(model)):
        hooks.append(module.register_forward_pre_hook(patch(layer)))
    yield
    for each in hooks:
        each.remove()


def weighed(rule: str, scale: float, logits: list[float], chosen: list[int]) -> list[float]:
    if rule.startswith("sqrtsoftplus"):
        raw = [math.sqrt(math.log1p(math.exp(logit))) for logit in logits]
    elif rule.startswith("sigmoid"):
        raw = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        raw = [math.exp(logit - max(logits)) for logit in logits]
    total = sum(raw) if rule == "softmax" else sum(raw[e] for e in chosen)
    return [raw[e] / (1 if rule == "sigmoid" else total) * scale for e in chosen]


def test_every_supported_family_is_tested() -> None:
    rules = {each.model_type: each.weight_rule for each in TABLE}
    assert {family: rule for family, (rule, _) in RULES.items()} == {
        family: rule for family, rule in rules.items() if rule
    }
    assert {family for family, rule in rules.items() if rule is None} == set(REFUSED)


@pytest.mark.parametrize("family", telling_fast(RULES, NEWER))
def test_a_policy_that_changes_nothing_leaves_the_stock_logits(made: Any, family: str) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        source, store = made(family, precision)
        policy = find_policy(f"{OWN}:Kept")
        with Runner(store, Settings(policy, slots=2)) as runner:
            assert runner.weight_rule == RULES[family]
            assert torch.equal(logits_of(runner.model), logits_of(stock_model(source, dtype)))
            totals = runner.session.totals
            assert totals.gate_mass > 0
            assert totals.rerouted == 0


@pytest.mark.parametrize("family", telling_fast(PATCHED, NEWER))
def test_other_experts_are_those_of_a_stock_model_whose_gates_choose_them(
    made: Any, family: str
) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        source, store = made(family, precision)
        with Runner(store, Settings(find_policy(f"{OWN}:Second"), slots=2)) as runner:
            found = logits_of(runner.model)
            assert 0 < runner.session.totals.rerouted_share < 1
        stock = stock_model(source, dtype)
        plain = logits_of(stock)
        with patched_gates(stock, *RULES[family], half=True):
            assert torch.equal(found, logits_of(stock))
        assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", telling_fast(PATCHED, NEWER))
def test_weights_of_float16_logits_are_close_to_those_of_the_gate_s_own(
    made: Any, family: str
) -> None:
    source, store = made(family, "fp32")
    with Runner(store, Settings(find_policy(f"{OWN}:Second"), slots=2)) as runner:
        found = logits_of(runner.model)
    stock = stock_model(source, torch.float32)
    with patched_gates(stock, *RULES[family], half=False):
        error = (found - logits_of(stock)).abs().max() / found.abs().max()
    assert error < 2e-3, float(error)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_weights_follow_no_rule_is_refused_in_a_line(made: Any, family: str) -> None:
    _, store = made(family, "fp32")
    with pytest.raises(PolicyError, match="by none of the rules known: softmax") as refused:
        Runner(store, Settings(find_policy(f"{OWN}:Kept"), slots=2))
    assert "\n" not in str(refused.value)
    assert str(store.index.model) in str(refused.value)
    with Runner(store, Settings(find_policy("lru"), slots=2)) as runner:
        assert runner.weight_rule is None
