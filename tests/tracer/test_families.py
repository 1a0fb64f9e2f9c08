"""Every family is recorded: what its gates gave, by which rule they made weights, and what later
gates would have said."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import moetrace
import numpy as np
import pytest
import torch
from moeroute import Trace, open_trace
from moeroute.families import family_of
from moerun.checkpoint.families import empty_model, find_experts, text_alone
from moerun.offload.gate_predictor import find_routers
from moetrace.model import dense_sizes_of
from support.families import FAMILIES, save_small, telling_fast
from transformers import AutoModelForCausalLM

IDS = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(5))


@cache
def stock(family: str, folder: Path) -> Any:
    source = save_small(family, folder / family, decided=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # after which nothing would be recorded
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def record(model: Any, out: Path) -> tuple[Trace, list[tuple[Any, Any]]]:
    """The trace of a prompt and four tokens, and what the experts of each layer were given."""
    given: list[tuple[Any, Any]] = []

    def keep(_module: Any, arguments: Any) -> None:
        given.append((arguments[1].clone(), arguments[2].clone()))

    def keep_scores(_router: Any, _arguments: Any, output: Any) -> None:
        weights, ids = output[0].max(-1, keepdim=True)
        given.append((ids, weights))

    if model.config.model_type == "llama4_text":  # whose experts are given no choice
        hooks = [r.register_forward_hook(keep_scores) for r in find_routers(model)]
    else:
        hooks = [module.register_forward_pre_hook(keep) for _, module in find_experts(model)]
    with moetrace.recording(model, out, horizon=2), torch.no_grad():
        model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    for hook in hooks:
        hook.remove()
    return open_trace(str(out)), given


@pytest.mark.parametrize("family", telling_fast(FAMILIES))
def test_a_recording_has_what_the_experts_were_given(
    family: str, folder: Path, tmp_path: Path
) -> None:
    model = stock(family, folder)
    trace, given = record(model, tmp_path / "t.parquet")
    n_layers = len(find_experts(model))
    entry = family_of(family)
    assert entry is not None
    assert trace.meta.n_layers == n_layers
    assert trace.meta.weight_rule == entry.weight_rule
    experts, weights = trace.array("experts"), trace.array("weights")
    row = 0
    for step in range(5):
        tokens = 12 if step == 0 else 1
        for token in range(tokens):
            for layer in range(n_layers):
                ids, of = given[step * n_layers + layer]
                wanted = dict(zip(ids[token].tolist(), of[token].tolist(), strict=True))
                found = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
                assert found == pytest.approx(wanted, rel=1e-5)
                row += 1
    assert row == trace.n_rows
    assert np.isfinite(trace.array("router_logits").astype(np.float32)).all()


def test_what_a_table_of_tokens_decides_is_predicted_exactly(folder: Path, tmp_path: Path) -> None:
    model = stock("deepseek_v4", folder)
    trace, _ = record(model, tmp_path / "t.parquet")
    layer = trace.array("layer")
    of_table = [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "hash_moe"]
    assert of_table == [0, 1]
    rows = np.flatnonzero(layer == 1)
    predicted = trace.array("predicted_logits_1")[rows].astype(np.float32)
    chosen = np.argsort(-predicted, axis=1)[:, : trace.meta.top_k]
    assert (np.sort(chosen, axis=1) == np.sort(trace.array("experts")[rows], axis=1)).all()
    # By the gate's own logits it would not have been.
    logits = trace.array("router_logits")[rows].astype(np.float32)
    best = np.argsort(-logits, axis=1)[:, : trace.meta.top_k]
    assert (np.sort(best, axis=1) != np.sort(trace.array("experts")[rows], axis=1)).any()


@pytest.mark.parametrize("family", telling_fast(["gemma4", "qwen3_5_moe", "llama4"], ()))
def test_sizes_of_a_recorded_model_are_those_of_its_text(family: str, folder: Path) -> None:
    model = stock(family, folder)
    sizes = dense_sizes_of(model, torch.float32)
    alone = empty_model(text_alone(model.config), torch.float32)
    wanted = dense_sizes_of(alone, torch.float32)
    assert sizes == wanted
