"""A whole model read by the readers of `moerun pack`: the stock model's own logits."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from moerun.checkpoint.source import ModelSource
from moerun.offload.whole import whole_model
from support.families import save_small
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
FAMILIES = ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow), "nemotron_h"]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logits_are_the_stock_models(family: str, tmp_path: Path) -> None:
    folder = save_small(family, tmp_path, decided=True)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with closing(ModelSource(folder)) as source:
        model = whole_model(source, torch.float32, CPU)
    ids = torch.randint(3, 120, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = (each(ids).logits for each in (model, stock))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(p.shape) for name, p in stock.named_parameters()
    }
