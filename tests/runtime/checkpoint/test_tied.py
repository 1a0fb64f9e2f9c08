"""Tied embeddings: which tensors are one follows stock transformers, whatever the config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from moerun.offload.load import load_offloaded
from moerun.store.pack import pack
from support import checkpoints as made
from support.runs import ResidentProvider

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe")
CASES = ("absent", "equal", "differs", "embedding absent")


def put_head(tensors: made.Tensors, case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    other = torch.randn(tensors[EMBEDDING].shape, generator=generator)
    if case == "embedding absent":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    elif case != "absent":
        tensors[HEAD] = other if case == "differs" else tensors[EMBEDDING].clone()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tying_follows_stock(tmp_path: Path, family: str, case: str) -> None:
    more = {"num_experts": 8} if family == "qwen3_moe" else {}
    folder = made.make_checkpoint(family, tmp_path / "model", tie_word_embeddings=True, **more)
    made.change_weights(folder, lambda tensors: put_head(tensors, case))
    notes: list[str] = []
    store = pack(folder, tmp_path / "store", report=notes.append)
    stock = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (case != "differs")
    assert (HEAD in store.dense_tensors()) == (case == "differs")
    assert any("is kept, as stock transformers does" in n for n in notes) == (case == "differs")
